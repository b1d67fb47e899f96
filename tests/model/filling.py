"""Where `fill` was before the models' own checks used it too."""

from x2i.model.filling import fill

__all__ = ["fill"]
