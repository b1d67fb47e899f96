"""x2i: annotate once, select many, assemble exactly; then train on the plan.

from x2i import corpus
c = corpus.open("runs/quickstart/corpus")
"""

__version__ = "0.1.0"
