"""Ovis2: a language model that reads images as probabilistic visual tokens; understanding only (arXiv 2405.20797)."""
