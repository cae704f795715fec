"""Every verified family passes every check; the checks themselves fail on an LM that is broken on purpose."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from flamingo import UserError
from flamingo.conformance.checks import CHECKS, ConformanceError, conform
from flamingo.conformance.tiny_models import FAMILIES, document, loaded_lm, subject, tiny_lm
from flamingo.language.hooks import embedding_scale
from flamingo.training.distributed.conformance import main as sharded_conformance
from flamingo.training.distributed.conformance import two_processes

ROOT = Path(__file__).resolve().parents[2]
# In a process of its own: what is compiled here would be the shape checks that the test run adds to every function.
QUICK = [name for name in CHECKS if name != "compiled"]


@pytest.mark.parametrize("check", QUICK)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, check: str) -> None:
    assert CHECKS[check](partial(tiny_lm, family))


@pytest.mark.slow
def test_the_table_of_all_families_compiled() -> None:
    run = conformance(*FAMILIES, "--checks", "compiled")
    assert run.returncode == 0, run.stdout + run.stderr
    rows = {line.split()[0]: line for line in run.stdout.splitlines()[1:-1]}
    assert list(rows) == list(FAMILIES)
    assert "one graph" in rows["llama"]


@pytest.mark.slow
def test_two_processes_are_one() -> None:
    outcomes = two_processes({family: partial(tiny_lm, family) for family in FAMILIES})
    assert {family: outcome.note for family, outcome in outcomes.items() if not outcome.passed} == {}
    assert list(outcomes) == list(FAMILIES)


def conformance(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flamingo", "conformance", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_of_two_processes(capfd: pytest.CaptureFixture[str]) -> None:
    assert sharded_conformance(["gtp2"]) == 2
    assert "families are gpt2, opt" in capfd.readouterr().err
    assert sharded_conformance(["gpt2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["language", "model", "two_processes"]
    assert lines[1].split()[0] == "gpt2"


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """A folder is checked as a family is; a name that is neither is one line."""
    tiny_lm("gpt2").save_pretrained(tmp_path / "lm")
    run = conformance(str(tmp_path / "lm"), "--checks", "closed_gates", "cached")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0].split()[2:] == ["closed_gates", "cached"]
    assert run.stdout.splitlines()[1].split()[1] == "exact"
    for arguments, sentence in (
        (["gtp2"], "families are gpt2, opt"),
        (["--checks", "cache"], "checks are closed_gates"),
    ):
        refused = conformance(*arguments)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert sentence in refused.stderr


class Leaky(LlamaForCausalLM):
    """Its third layer looks at the whole row and not only back: no cache can be right."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[2].register_forward_pre_hook(mixed)


def mixed(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0] + args[0].mean(1, keepdim=True), *args[1:])


def leaky() -> PreTrainedModel:
    torch.manual_seed(0)
    return Leaky(tiny_lm("llama").config).eval()


def test_a_broken_lm_fails() -> None:
    for check in ("cached", "batched", "images_matter"):
        with pytest.raises(ConformanceError, match="differ"):
            CHECKS[check](leaky)
    outcome = next(conform(leaky, ["cached"]))
    assert not outcome.passed
    assert outcome.note.startswith("ConformanceError: cached and uncached logits differ by")


def test_a_check_without_an_lm_is_an_outcome() -> None:
    def nothing() -> PreTrainedModel:
        raise UserError("there is no LM")

    assert [o.note for o in conform(nothing, ["cached"])] == ["UserError: there is no LM"]
    with pytest.raises(UserError, match="neither a folder nor a known family"):
        loaded_lm("gtp2")


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_new_tokens_are_scaled_as_the_lm_scales_its_own(family: str) -> None:
    """A new token with the row of an old one is that old one, inside the model."""
    model = subject(partial(tiny_lm, family))
    table: Any = model.language_model.get_input_embeddings()
    scale = embedding_scale(table)
    assert scale is not None
    assert float(scale) == pytest.approx(table.embedding_dim**0.5)
    old, new = 40, model.config.eoc_token_id
    with torch.no_grad():
        model.new_tokens.input_rows[model.new_tokens.ids.index(new)] = table.weight[old]
        inputs: Any = document(model, [2])
        texts = inputs["input_ids"].repeat(2, 1)
        texts[:, 3] = torch.tensor([old, new])
        logits = model(input_ids=texts, image_counts=torch.tensor([0, 0])).logits
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_recomputation_walks_back_to_the_first_block_only(family: str) -> None:
    model = subject(partial(tiny_lm, family))
    model.freeze({"new_tokens": "frozen"})
    model.activation_checkpointing_enable()
    model.train()
    seen = []
    hook = model.language_model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.requires_grad)
    )
    model(**document(model, side="right"))
    hook.remove()
    assert seen == [False]
