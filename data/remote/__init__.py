"""TODO data/remote."""
