"""TODO data/prepare/web."""
