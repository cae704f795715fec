"""TRL's own SFT and DPO trainers on this model: their losses are ours, on the same batch, with images and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from flamingo import FlamingoForConditionalGeneration, UserError
from flamingo.labels import SOFT_ID
from flamingo.soft_prompts import new_soft_prompt
from flamingo.training.objectives.flamingo import FlamingoObjective
from flamingo.training.objectives.preference import PreferenceObjective
from flamingo.trl_head import use_own_head
from tests.model import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # TRL's own calls of transformers
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "max_steps": 2,
    "report_to": [],
    "use_cpu": True,
    "gradient_checkpointing": False,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}
LORA = LoraConfig(r=2, target_modules=r"language_model\..*\.[qv]_proj")
TEXTS = [("Is it red?", " Yes", " No, blue"), ("What?", " A cat", " A dog"), ("Who?", " Me", " You")]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(tiny.picture(seed).permute(1, 2, 0).numpy())


def rows(answers: tuple[str, ...], *, images: bool) -> Dataset:
    columns: dict[str, list[Any]] = {"prompt": [("<image>" if images else "") + prompt for prompt, *_ in TEXTS]}
    for place, name in enumerate(answers):
        columns[name] = [text[1 + place] for text in TEXTS]
    if images:
        columns["images"] = [[picture(index)] for index in range(len(TEXTS))]
    return Dataset.from_dict(columns)


def shaken(model: Any) -> None:
    """Adapters that are not nothing: otherwise every DPO loss is log 2."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def batch_of(trainer: Any) -> dict[str, Any]:
    return dict(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("images", [False, True])
def test_dpo(images: bool, tmp_path: Path) -> None:
    model, processor = tiny.flamingo("llama")
    trainer: Any = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), beta=0.3, **OPTIONS),
        train_dataset=rows(("chosen", "rejected"), images=images),
        processing_class=processor if images else processor.tokenizer,
        peft_config=LORA,
    )
    use_own_head(trainer)
    shaken(trainer.model)
    batch = batch_of(trainer)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    if images:
        inputs |= {"pixel_values": batch["pixel_values"].chunk(2)[0], "image_counts": batch["image_counts"]}
    else:
        inputs |= {"pixel_values": torch.zeros(0, 1, 3, tiny.SIZE, tiny.SIZE, dtype=torch.uint8)}
        inputs |= {"image_counts": torch.zeros(len(labels), dtype=torch.long)}
    flamingo = trainer.model.get_base_model()
    assert isinstance(flamingo, FlamingoForConditionalGeneration)
    ours = PreferenceObjective(beta=0.3).sums(flamingo, inputs)["preference"] / 3
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert abs(float(ours.detach()) - 0.6931) > 1e-3  # log 2, where policy and reference are the same
    before = {name: value.clone() for name, value in flamingo.named_parameters() if value.requires_grad}
    trainer.train()
    assert any(not torch.equal(value, flamingo.get_parameter(name)) for name, value in before.items())


@pytest.mark.parametrize("images", [False, True])
def test_sft(images: bool, tmp_path: Path) -> None:
    model, processor = tiny.flamingo("llama")
    trainer: Any = SFTTrainer(
        model,
        args=SFTConfig(str(tmp_path), **OPTIONS),
        train_dataset=rows(("completion",), images=images),
        processing_class=processor if images else processor.tokenizer,
        peft_config=LORA,
    )
    use_own_head(trainer)
    shaken(trainer.model)
    batch = batch_of(trainer)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    objective, flamingo = FlamingoObjective(), trainer.model.get_base_model()
    ours = objective.sums(flamingo, batch)["text"] / objective.counts(batch)["text"]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    labelled = batch["labels"][batch["labels"] != -100]
    assert 0 < len(labelled) < batch["attention_mask"].sum()  # the prompt is not learnt
    trainer.train()
    out = trainer.model.generate(**processor(images=[[picture(0)]], text="<image>What?"), max_new_tokens=3)
    assert out.shape[0] == 1


def test_labels_on_a_soft_prompt_are_none_to_learn() -> None:
    """TRL's labels are the ids, those of a soft prompt's vectors among them, which have no logit."""
    model, processor = tiny.flamingo("llama")
    new_soft_prompt(model, processor, tokens=2)
    inputs = processor(text="Is it red?")
    ids = inputs["input_ids"]
    assert bool((ids >= SOFT_ID).any())

    class Trainer:
        pass

    trainer: Any = Trainer()
    trainer.model = model.eval()
    expected = model(**inputs, labels=ids).loss
    use_own_head(trainer)
    found = model(**inputs, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(found.loss, expected, atol=1e-6, rtol=1e-6)
    assert not bool((found.label_mask & (ids[:, 1:] >= SOFT_ID)).any())


def test_another_model_is_refused(tmp_path: Path) -> None:
    class Trainer:
        model = tiny.lm("llama")

    with pytest.raises(UserError, match="LlamaForCausalLM, which TRL knows by itself"):
        use_own_head(Trainer())
