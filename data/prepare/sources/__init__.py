"""The input of `python -m data prepare NAME` in, documents out: `NAME.py` is a source.

The table `data.prepare.SOURCES` lists them, and `data.prepare` describes the functions that a source has. Begin at
`folder.py`, the shortest one.
"""
