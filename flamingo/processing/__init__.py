"""What `FlamingoProcessor` is put together from.

In come images, clips, prompts and chat messages as people write them; out go uint8 frames of one size, and pieces of
text with the ids of tags between them. Begin with `rows.py`, which says what a prompt is; `chat.py` makes prompts of
messages, `image_processor.py` and `video_processor.py` make pixels.
"""
