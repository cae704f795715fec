"""Data by a model: captions and the sentences around images go in, conversations about the images come out.

`endpoint.py` asks any OpenAI-compatible endpoint and keeps every reply (`reply_log.py`), also for `eval.judging`;
`settings.py` reads command lines and prompts. `conversations.py` makes requests of captions and conversations of
replies; begin with `command.run`.
"""
