"""TODO data/prepare/sources."""
