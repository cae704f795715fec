"""Does a language model work inside a Flamingo? Equalities that answer it for any causal LM.

A function that builds the LM comes in; a result for each check goes out: passed or not, and the largest difference.
Begin at `checks.py`; `tiny_models.py` has the families that the tests go through.
"""
