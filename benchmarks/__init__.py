"""The same work with the same weights, here and in open_flamingo 2.0.1: time, memory and multiply-adds.

    python -m benchmarks                      every measurement at size small, each in a process of its own
    python -m benchmarks decode_step --size tiny
    python -m benchmarks gpu                  what is promised on a GPU, this library alone: `gpu.py`

It needs `pip install --no-deps open_flamingo==2.0.1 einops-exts`. A multiply-add counts as two operations (FLOP), as
everywhere in the field; counts do not depend on the machine, times do. `__main__.py` starts the measurements,
`measure.py` takes one, `work.py` and `sizes.py` say of what, `table.py` prints.
"""
