"""TODO flamingo/conformance."""
