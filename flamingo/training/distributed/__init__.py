"""TODO flamingo/training/distributed."""
