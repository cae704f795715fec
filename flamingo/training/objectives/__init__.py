"""TODO flamingo/training/objectives."""
