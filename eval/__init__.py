"""Few-shot evaluation: a model and tasks go in; scores with intervals, samples and HTML reports come out.

`launch.evaluate` builds the tasks and the model, `runner.run` is the only loop, `reports` writes what is left. Begin
with `runner.py`. It runs from a checkout and is never installed; nothing is imported here, so `python -m eval` starts
quickly.
"""
