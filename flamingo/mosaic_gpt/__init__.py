"""MosaicGPT, the language model of OpenFlamingo's 3B releases, which transformers does not have.

A released config and its weights come in; a causal LM like any other of transformers goes out. Begin at `modeling.py`;
importing `configuration.py` alone makes the model type known.
"""
