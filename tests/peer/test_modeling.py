"""transformers' common tests of models, configs and training, on a tiny Flamingo."""

from __future__ import annotations

import unittest
from typing import Any
from unittest.mock import patch

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

SKIPPED: dict[str, str] = {
    "test_can_init_all_missing_weights": (
        "the new parts are drawn by their constructors, in an order that seeded runs rely on, so that weights drawn "
        "later cannot be equal; tests/model/test_loading_uses.py checks that they are drawn and how"
    ),
    "test_model_weights_reload_no_missing_tied_weights": (
        "it loads a file that holds none of the model's weights, which is refused here, also for a caller who asks for "
        "the loading info; tests/test_spoiled_input.py checks that, and tests/model/test_life.py tied weights"
    ),
    "test_model_base_model_prefix": (
        "the gated blocks stand between the layers of an LM that keeps its own head, so no base model without a head "
        "could be run alone"
    ),
}
"""Test -> why it cannot apply to a model whose encoder and LM are frozen and any library's."""


class FlamingoModelTester:
    """What the common tests ask of a model: sizes, a config, and inputs."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 3, 7, 32, 2, 4
    vocab_size = VOCABULARY
    is_training = True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.image = VOCABULARY  # and <|endofchunk|> behind it: ids that the LM has no rows for, as usual
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
            image_token_id=self.image,
            eoc_token_id=self.image + 1,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[FlamingoConfig, dict[str, Any]]:
        input_ids = torch.randint(5, VOCABULARY, (self.batch_size, self.seq_length))
        input_ids[:, 0] = self.image
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
    additional_model_inputs = ("pixel_values", "image_counts")
    test_torch_exportable = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        if reason := SKIPPED.get(self._testMethodName):
            self.skipTest(reason)
        self.model_tester = FlamingoModelTester(self)
        if "eager_matches_sdpa" in self._testMethodName:
            self.model_tester.batch_size = 7  # smaller batches get rows of random tokens, which have no images
        if "resize" in self._testMethodName:
            self.model_tester.image = 3  # these tests cut ids to a smaller table and must not cut the tag
        self.config_tester = ConfigTester(self, config_class=FlamingoConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs: dict[str, Any], model_class: Any, return_labels: bool = False) -> Any:
        prepared = super()._prepare_for_class(inputs, model_class, return_labels=False)
        if return_labels:  # their table of classes with a language model's loss cannot know ours
            prepared["labels"] = prepared["input_ids"].masked_fill(
                prepared["input_ids"] == self.model_tester.image, -100
            )
        return prepared

    def _get_trainable_model_class(self) -> Any:
        """Return a model whose LM trains as well: what is random and frozen cannot be made to say anything."""

        def unfrozen(config: FlamingoConfig) -> FlamingoForConditionalGeneration:
            model = FlamingoForConditionalGeneration(config)
            model.freeze({"language": "train"})
            return model

        return unfrozen

    def test_training_overfit(self) -> None:
        config = self.model_tester.get_config()
        config.vocab_size = VOCABULARY  # the mixin knows no config with a text_config
        with patch.object(self.model_tester, "get_config", lambda: config):
            super().test_training_overfit()

    def test_config(self) -> None:
        self.config_tester.run_common_tests()
