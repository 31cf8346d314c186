"""Operators as TE computations on logical NCHW tensors, each with its NumPy float64 reference."""
