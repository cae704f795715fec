"""Resumable checkpoints: exact, atomic, strict."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from flamingo.errors import UserError
from flamingo.training.checkpoints import store
from tests.training.world import save_checkpoint


def small(seed: int, *, width: int = 4) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 1))
    model.get_parameter("0.bias").requires_grad_(False)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model(torch.ones(2, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_resumed_is_uninterrupted_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    model, optimizer = small(0)
    steps(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, model, optimizer, {"step": 3, "loader": {"at": 7}}, keep_last=2)
    expected = steps(model, optimizer, 4)
    other, fresh = small(1)
    with torch.no_grad():
        other.get_parameter("0.bias").copy_(model.get_parameter("0.bias"))  # frozen weights are not in a checkpoint
    newest = store.newest(tmp_path)
    assert newest is not None
    assert store.load(newest, other, fresh) == {"step": 3, "loader": {"at": 7}}
    assert steps(other, fresh, 4) == expected


def test_interrupted_save_is_never_chosen_and_is_removed(tmp_path: Path) -> None:
    model, optimizer = small(0)
    steps(model, optimizer, 1)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, model, optimizer, {"step": step}, keep_last=2)
    assert [step for step, _ in store.step_folders(tmp_path)] == [2, 3]
    (tmp_path / "step-00000003" / ".metadata").unlink()  # as if killed before the commit
    assert store.newest(tmp_path) == tmp_path / "step-00000002"
    save_checkpoint(tmp_path, 4, model, optimizer, {"step": 4}, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = small(0)
    steps(model, optimizer, 1)
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=2)
    model.get_parameter("0.bias").requires_grad_(True)
    with pytest.raises(UserError, match=r"train different parameters .* the first is 0\.bias"):
        store.load(path, model, torch.optim.AdamW(model.parameters()))


def test_failed_save_leaves_the_last_one(tmp_path: Path) -> None:
    model, optimizer = small(0)
    steps(model, optimizer, 1)
    good = save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=2)
    (tmp_path / "step-00000002").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep_last=2)
    assert store.newest(tmp_path) == good
    shutil.rmtree(tmp_path)
