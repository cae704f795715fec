"""transformers' common tests of models, configs and training, on a tiny Flamingo."""

from __future__ import annotations

import unittest
from typing import Any

import pytest
import torch

from flamingo import FlamingoConfig, FlamingoForConditionalGeneration
from tests.peer import suite

modeling = suite.load("test_modeling_common")
ModelTesterMixin: Any = modeling.ModelTesterMixin
GenerationTesterMixin: Any = modeling.GenerationTesterMixin
TrainingTesterMixin: Any = suite.load("test_training_mixin").TrainingTesterMixin
ConfigTester: Any = suite.load("test_configuration_common").ConfigTester

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

VOCABULARY = 99
IMAGE, END = VOCABULARY, VOCABULARY + 1

SKIPPED: dict[str, str] = {}
"""Test -> why it cannot apply to a model whose encoder and LM are frozen and any library's."""


class FlamingoModelTester:
    """What the common tests ask of a model: sizes, a config, and inputs."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 3, 7, 32, 2, 4
    vocab_size = VOCABULARY
    is_training = True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.text_config: dict[str, Any] = {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        self.vision_config: dict[str, Any] = {
            "model_type": "clip_vision_model",
            "image_size": 28,
            "patch_size": 14,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }

    def get_config(self) -> FlamingoConfig:
        return FlamingoConfig(
            text_config=self.text_config,
            vision_config={"kind": "transformers", "name": "tiny", "arch": self.vision_config, "image_size": 28},
            resampler_config={"depth": 1, "heads": 2, "head_dim": 8, "latents": 4},
            cross_attention_config={"heads": 2, "head_dim": 8, "gate_init": 0.5},
            image_token_id=IMAGE,
            eoc_token_id=END,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[FlamingoConfig, dict[str, Any]]:
        input_ids = torch.randint(3, VOCABULARY, (self.batch_size, self.seq_length))
        input_ids[:, 0] = IMAGE
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(self.batch_size, 1, 3, 28, 28),
            "image_counts": torch.ones(self.batch_size, dtype=torch.long),
        }
        return self.get_config(), inputs


class FlamingoModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """Every common test of a composite model that generates."""

    all_model_classes = (FlamingoForConditionalGeneration,)
    model_tester: Any = None  # an abstract property of the training mixin
    _is_composite = True
    test_torch_exportable = False

    def setUp(self) -> None:
        if reason := SKIPPED.get(self._testMethodName):
            self.skipTest(reason)
        self.model_tester = FlamingoModelTester(self)
        self.config_tester = ConfigTester(self, config_class=FlamingoConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs: dict[str, Any], model_class: Any, return_labels: bool = False) -> Any:
        prepared = super()._prepare_for_class(inputs, model_class, return_labels=False)
        if return_labels:  # their table of classes with a language model's loss cannot know ours
            prepared["labels"] = prepared["input_ids"].masked_fill(prepared["input_ids"] == IMAGE, -100)
        return prepared

    def test_config(self) -> None:
        self.config_tester.run_common_tests()
