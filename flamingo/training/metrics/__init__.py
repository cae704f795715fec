"""Figures of a run: in come loss sums, micro-batches and the model, out come named values per logged step.

`throughput.py` computes them; `sinks.py` writes them to files, the console and services.
Begin with `throughput.py`; `loss_plot.py` draws the finished run.
"""
