"""Driving a causal LM of transformers without changing it: hooks, new tokens, packing, loss.

A language model and the state of one call come in; its layers then run with the gated blocks in front of them, and
hidden states become losses or logits. Begin at `hooks.py`, the only file that knows where an LM keeps its layers.
"""
