"""What frozen connections are good for: the uses of the paper's section 4."""
