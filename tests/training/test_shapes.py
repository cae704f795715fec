"""The paper's and OpenFlamingo's shapes, built on the meta device: nothing is allocated, everything is counted."""

from __future__ import annotations

import pytest
import torch

from flamingo import FlamingoForConditionalGeneration
from flamingo.training.compose import compose
from flamingo.training.memory_plan.plan import complete
from flamingo.training.objectives.build import flamingo_shape

# Billions of parameters as published: paper, table 5 (its 3B: gated blocks 1.2, resampler 0.19, LM 1.4; its 9B: 1.6 and
# 7.1), OpenFlamingo's table 1 (LM of 1, 3 and 7 billion; blocks counted from OpenFlamingo's layers).
PUBLISHED = {
    "flamingo_3b": {"language": 1.4, "cross_attention": 1.2, "resampler": 0.194, "vision": 0.435},
    "flamingo_9b": {"language": 7.1, "cross_attention": 1.6, "resampler": 0.194, "vision": 0.435},
    "openflamingo_3b": {"language": 1.3, "vision": 0.303},
    "openflamingo_4b": {"language": 2.8, "vision": 0.303},
    "openflamingo_9b": {"language": 6.6, "vision": 0.303},
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_shape_is_the_published_one(name: str) -> None:
    config = flamingo_shape(complete(compose([f"experiment={name}"]).model))
    with torch.device("meta"):
        model = FlamingoForConditionalGeneration(config)
    counted: dict[str, float] = {}
    for key, parameter in model.named_parameters():
        assert parameter.is_meta
        counted[model.part_of(key)] = counted.get(model.part_of(key), 0.0) + parameter.numel() / 1e9
        assert parameter.requires_grad == (model.part_of(key) not in ("vision", "language"))
    for part, published in PUBLISHED[name].items():
        assert counted[part] == pytest.approx(published, rel=0.15), (part, counted)


def test_openflamingo_9b_has_its_eight_blocks() -> None:
    config = flamingo_shape(complete(compose(["experiment=openflamingo_9b"]).model))
    assert config.cross_attn_layers == [3, 7, 11, 15, 19, 23, 27, 31]
    assert (config.resampler.latents, config.resampler.depth, config.cross_attention.heads) == (64, 6, 8)
