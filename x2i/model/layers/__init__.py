"""Layers that two architectures really share."""
