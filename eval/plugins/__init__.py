"""Our model inside other evaluation harnesses, with few-shot images, which neither of them has.

Requests of lm-eval or lmms-eval go in, their scores and texts come out; `harness_prompts` is what both share. Begin
with `lm_eval_model.FlamingoLM`.
"""
