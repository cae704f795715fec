"""The modules that train, and the pure functions that say which image a token sees.

Encoder tokens (I, F, P, V) come in, a connector makes latents (I, L, E) of them, and gated cross-attention blocks add
to the LM's hidden states what the tokens see there. Begin at `media_mask.py` for who sees what, at `connector.py` to
add a connector.
"""
