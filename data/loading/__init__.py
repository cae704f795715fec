"""TODO data/loading."""
