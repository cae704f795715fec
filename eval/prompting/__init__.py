"""Prompting: an episode goes in, requests to the model and finally an answer come out.

`prompts` turns an episode into token ids and images, `strategies` decides what is asked: directly, with a rationale
first, or many times. Begin with `strategies.plain`.
"""
