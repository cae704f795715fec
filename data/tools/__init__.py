"""Shards in; faults, or a document as a person would look at it, out.

`verify` is `python -m data verify`; `show` and `show_sampled` are `python -m data inspect`, without and with the
cropping of training. Begin at `verify.verify`.
"""
