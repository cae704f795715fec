"""Image and text encoders compared by their vectors: zero-shot classification, retrieval, and search in an index.

A dual encoder (`encoder.py`: open_clip's, transformers', or one trained here) gives images and texts vectors of length
1; `tasks.py` says what is compared with what, `launch.py` runs `python -m eval` for such tasks, `index.py` keeps the
vectors of a folder or of shards and searches them, and `commands.py` is `python -m eval index` and `search`. Begin with
`encoder.py`.
"""
