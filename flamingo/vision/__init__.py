"""TODO flamingo/vision."""
