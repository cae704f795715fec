"""TODO flamingo/layers."""
