"""TODO flamingo/training/metrics."""
