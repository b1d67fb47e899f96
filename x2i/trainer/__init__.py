"""Trains unified models on X2I corpora: a planned order of samples, stages, checkpoints, metrics, previews."""
