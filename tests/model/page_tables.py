"""The tables of docs/model.md, from the lists that the tests go through: `python -m tests.model.page_tables`."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from flamingo.config import CrossAttentionConfig
from flamingo.conformance.checks import CHECKS
from flamingo.conformance.tiny_models import FAMILIES
from flamingo.convert.presets import PRESETS
from flamingo.layers.connector import CONNECTORS, connector_class
from flamingo.training.distributed.conformance import two_processes
from tests.model.test_encoders import OPEN_CLIP_ENCODERS
from tests.model.test_transformers_encoders import ENCODERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "model.md"
MARK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def rows(head: Iterable[str], body: Iterable[Iterable[object]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *([str(cell) for cell in line] for line in body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def first_sentence(text: str | None) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def checks() -> str:
    body = [(f"`{name}`", first_sentence(check.__doc__)) for name, check in CHECKS.items()]
    body.append((f"`{two_processes.__name__}`", "Two processes under FSDP2 give the loss and the gradients of one."))
    return rows(("check", "what it says"), body)


def families() -> str:
    def class_of(model_type: str) -> str:
        found: type = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(model_type))]  # type: ignore[assignment]
        return found.__name__

    return rows(("name", "class"), ((f"`{name}`", f"`{class_of(kind)}`") for name, (kind, _) in FAMILIES.items()))


def encoders() -> str:
    ours, own = "interpolated here", "takes any size"
    sizes = {"ConvNeXt": own, "NFNet": own, "EVA": "by timm", "SigLIP": "by timm"}
    with_class_token = ("ViT", "CoCa", "EVA")
    body = [
        ("open_clip", name, "class token" if name in with_class_token else "-", sizes.get(name, ours))
        for name in OPEN_CLIP_ENCODERS
    ]
    prefixes = {0: "-", 1: "class token", 2: "class and distillation token", 5: "class token and 4 registers"}
    body += [
        ("transformers", name, prefixes[prefix], ours if resized else own)
        for name, (_, prefix, resized) in ENCODERS.items()
    ]
    return rows(("library", "encoder", "in front", "another size"), body)


def fields_of(options: type) -> Iterable[tuple[str, str, str]]:
    """(field, default, the sentence behind it) of a dataclass of options."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(options) or options))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == options.__name__)
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            assert field.value is not None
            yield field.target.id, ast.unparse(field.value).replace("'", '"'), first_sentence(str(text.value.value))


def switches() -> str:
    groups = {name: connector_class(name).Options for name in CONNECTORS}
    groups["cross_attention"] = CrossAttentionConfig
    body = [
        (f"`{group}`", f"`{field}`", f"`{default}`", text.replace("|", "\\|"))
        for group, options in groups.items()
        for field, default, text in fields_of(options)
    ]
    return rows(("of", "option", "default", "meaning"), body)


def presets() -> str:
    body = (
        (f"`{name}`", f"`{p.repository}`", f"{p.parameters:g}", p.cross_attn_every_n_layers, p.language or "its own")
        for name, p in PRESETS.items()
    )
    return rows(("preset", "weights", "parameters (10^9)", "block every", "language model"), body)


def filled(text: str) -> str:
    """The page with its tables as they should be."""
    made = {f.__name__: f() for f in (checks, families, encoders, switches, presets)}
    return MARK.sub(lambda found: found[1] + made[found[2]] + found[4], text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
