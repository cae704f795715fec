"""`python -m data bench`: this loader and open_flamingo's own on the same shards, and what else the loader promises."""
