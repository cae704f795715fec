"""Shards made for measuring in, tables out: `python -m data bench` and `python -m data simulate`.

`table` runs `measure` in fresh processes for this loader (`ours`) and open_flamingo's (`peer`) on the shards of
`material`; `simulate` computes what a corpus of any size would cost. Begin at `table.run`.
"""
