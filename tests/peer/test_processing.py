"""transformers' common tests of processors, on ours with a tiny tokenizer."""

from __future__ import annotations

import unittest
from typing import Any

import pytest
from transformers import ProcessorMixin

from flamingo import FlamingoProcessor
from tests.model import tiny
from tests.peer import suite

ProcessorTesterMixin: Any = suite.load("test_processing_common").ProcessorTesterMixin

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        not issubclass(FlamingoProcessor, ProcessorMixin), reason="FlamingoProcessor is not yet a ProcessorMixin"
    ),
]

SKIPPED: dict[str, str] = {
    "test_init_arguments_not_in_class_attributes": (
        "`max_frames` may be given at construction and changed later: a property hands it on to the video processor"
    ),
    "test_tokenizer_decode_defaults": (
        "our batch_decode leaves out special tokens unless skip_special_tokens=False: answers are what people decode"
    ),
}
"""Test -> why it cannot apply."""


class FlamingoProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    """Every common test of a processor of images, clips and text."""

    processor_class = FlamingoProcessor
    videos_input_name = "pixel_values"  # a clip is an image with several frames

    def setUp(self) -> None:
        if reason := SKIPPED.get(self._testMethodName):
            self.skipTest(reason)

    @classmethod
    def _setup_from_components(cls) -> Any:
        return tiny.flamingo("llama")[1]
