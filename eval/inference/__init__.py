"""Inference: prompts go in, completions or scores of candidates come out.

The engine batches requests, answers known ones from the log and shares the rest between processes; images are encoded
once and cached. Begin with `engine.Engine.ask`; `protocol.Responder` is what another model has to provide.
"""
