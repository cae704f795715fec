"""TODO data/tools."""
