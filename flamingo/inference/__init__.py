"""What a model does after training: continue prompts and score candidates.

Tokens and the images of a call come in; new tokens or log-probabilities go out, with every image encoded once per call
and remembered by the cache. Begin at `generation.py`; `scoring.py` ranks candidates through a trie of their tokens,
`media_cache.py` is what a call remembers of its images, `protocol.py` what both need of a model.
"""
