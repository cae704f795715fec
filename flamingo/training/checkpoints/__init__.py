"""TODO flamingo/training/checkpoints."""
