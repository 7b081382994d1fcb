"""What the operators of the gated delta rule share."""
