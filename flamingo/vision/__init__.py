"""Vision encoders of open_clip, timm and transformers behind one call, and the way from an image to their pixels.

Images come in, `transform.py` makes square uint8 pixels of them, and `encoder.py` patch tokens (I, F, P, D). Begin at
`encoder.py`; `resize.py` adapts an encoder to another image size.
"""
