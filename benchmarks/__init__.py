"""The same work with the same weights, here and in open_flamingo 2.0.1: time, memory and multiply-adds.

    python -m benchmarks                      every measurement at size small, each in a process of its own
    python -m benchmarks decode_step --size tiny

What it takes: `pip install --no-deps open_flamingo==2.0.1 einops-exts`. Notable: a multiply-add counts as two
operations (FLOP), as everywhere in the field; what is counted does not depend on the machine, what is timed does.
"""
