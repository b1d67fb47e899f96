"""Networks, their published numbers and names, and the maths of sampling: no data, no optimiser, no I/O but weights."""
