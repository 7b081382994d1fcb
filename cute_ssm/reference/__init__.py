"""The mathematics of every operator, stated once in PyTorch: the CPU implementation, and in float64 the oracle."""
