"""What `FlamingoProcessor` is put together from.

In come images, clips, prompts and chat messages as people write them; out go uint8 frames of one size, and pieces of
text with the ids of tags between them. Begin with `rows.py`, which says what a prompt is; `conversation.py` is the one
form of messages, `chat.py` makes prompts of them by a template, `turns.py` training rows of whole conversations, and
`templated.py` knows the templates; `image_processor.py` and `video_processor.py` make pixels.
"""
