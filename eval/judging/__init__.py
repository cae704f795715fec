"""A judge: finished runs go in, scores that a language model gives their answers come out.

`python -m eval judge RUN [RUN]` asks any OpenAI-compatible endpoint (`data.instruct.endpoint`) about each pair of
answers in both orders (`judge.py`) and counts relative scores, wins and the judge's bias for a place (`summary.py`).
Begin with `judge.judge`.
"""
