"""transformers' own common tests on a tiny Flamingo; see `suite.py` for where they come from."""
