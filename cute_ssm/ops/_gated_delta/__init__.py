"""Parts that the operators of the gated delta rule share, and that their kernels are composed of."""
