"""`python -m eval task=[toy_caption,toy_binding] shots=[0,4] model=FOLDER out=FOLDER`: few-shot evaluation.

hydra composes `hydra/eval.yaml`, the chosen `hydra/task/*.yaml` and the command line; the result is checked against
typed classes before any data or model is read. hydra is used as a function, not as a decorator: nothing changes the
working folder, and every mistake ends as one sentence on stderr and exit status 2.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parents[1] / "hydra"
HELP = """python -m eval model=FOLDER task=[NAME,...] [key=value ...]

few-shot evaluation: writes results.json, samples.jsonl, curve.png, gallery.html and gallery.png into out.

python -m eval prepare TASK --from FOLDER     are a data set's files there, and where are those missing published?

settings (hydra/eval.yaml), then tasks (hydra/task/): task.NAME.KEY=VALUE changes a task.
"""


def load_config(arguments: Sequence[str]) -> Any:
    """The checked `EvalConfig` of a command line. Raises UserError in one sentence."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, ConfigTypeError, MissingMandatoryValue, OmegaConfBaseException

    from eval.config import EvalConfig
    from flamingo.errors import UserError

    names = sorted(path.stem for path in (CONFIG / "task").glob("*.yaml"))
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
        # Only the choice of tasks is hydra's: `model` and `data` are names of the trainer's groups too, and settings
        # checked against the classes may be given whether or not a YAML mentions them.
        chosen = [str(override.input_line) for override in overrides if override.key_or_group == "task"]
        with initialize_config_dir(str(CONFIG), version_base="1.3"):
            composed = compose("eval", overrides=chosen)
        OmegaConf.set_struct(composed, None)  # so that a task's `fields` may grow; the classes refuse unknown keys
        typed = OmegaConf.merge(OmegaConf.structured(EvalConfig), composed)
        _apply_protocol(typed, overrides)
        for override in overrides:
            if override.key_or_group != "task":
                key, value = _setting(override, list(typed.task))
                OmegaConf.update(typed, key, value, force_add=False)
        config: Any = OmegaConf.to_object(typed)
    except UserError:
        raise
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or _one_line(error)
        raise UserError(f"{key} is missing; add {key}=VALUE") from None
    except (ConfigKeyError, ConfigTypeError) as error:
        raise UserError(
            f"unknown key {error.full_key!r} in the config; `python -m eval --help` lists the keys"
        ) from None
    except OmegaConfBaseException as error:
        text = _one_line(error)
        if " not in '" in text:  # in a class: `Key 'x' not in 'EvalConfig'`
            text = "is no setting; `python -m eval --help` lists them"
        raise UserError(f"{error.full_key}: {text}") from None
    except (HydraException, ValueError) as error:
        raise UserError(_hydra_sentence(error, names)) from None
    config.check()
    return config


def _apply_protocol(typed: Any, overrides: Sequence[Any]) -> None:
    """Put the protocol's settings over those of the tasks' files; the command line comes after them."""
    from omegaconf import OmegaConf

    from eval.protocols import settings_of

    said = {str(override.key_or_group): override.value() for override in overrides}
    protocol, bugs = str(said.get("protocol", typed.protocol)), said.get("bug_compatible", False) is True
    for name, task in typed.task.items():
        form = str(said.get(f"task.{name}.form", task.form))
        typed.task[name] = OmegaConf.merge(task, settings_of(protocol, name, form, bugs))


def _setting(override: Any, tasks: list[str]) -> tuple[str, Any]:
    """(key, value) of one `key=value`; a single value stands for a list of one. `tasks` are those chosen."""
    from flamingo.errors import UserError

    key = str(override.key_or_group)
    if override.is_delete() or override.is_sweep_override():
        raise UserError(f"{override.input_line}: write key=value, and lists in brackets, for example shots=[0,4]")
    if key.startswith("task.") and key.split(".")[1] not in tasks:
        raise UserError(f"{key} is of a task that is not chosen; chosen are {', '.join(tasks)}")
    value = override.value()
    return key, [value] if key in ("shots", "pictures") and not isinstance(value, list) else value


def _hydra_sentence(error: Exception, names: list[str]) -> str:
    """One sentence for hydra's own complaints, which run over several lines."""
    text = _one_line(error)
    if "Could not override '" in text:
        return f"unknown key {text.split(chr(39))[1]!r}; `python -m eval --help` lists the keys"
    if "'task/" in text:
        return f"unknown task {text.split('task/')[1].split(chr(39))[0]!r}; the tasks are {', '.join(names)}"
    return f"the command line cannot be read: {text}"


def _one_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_model_folder(model: str) -> Path:
    """The folder, if a model is in it; UserError otherwise."""
    from flamingo.errors import UserError

    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model={model} is no folder with a saved model (config.json is missing); give the folder that "
            "save_pretrained or train.py wrote"
        )
    return folder


def load_responder(config: Any) -> Any:
    """The model of `config.model` as a `FlamingoResponder`. Raises UserError when it cannot be loaded."""
    import torch
    from transformers.utils import logging

    from eval.model import FlamingoResponder
    from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
    from flamingo.errors import UserError

    folder = check_model_folder(config.model)
    logging.disable_progress_bar()  # the bar of the evaluation is the one to watch
    try:
        model = FlamingoForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, config.dtype))
        processor = FlamingoProcessor.from_pretrained(folder)
    except OSError as error:
        raise UserError(f"model={config.model} cannot be loaded: {_one_line(error)}") from None
    return FlamingoResponder(model, processor, config.device_name())


def evaluate(config: Any, command: Sequence[str]) -> dict[str, Any]:
    """Run what the config asks for and write every output. Returns the content of results.json."""
    from eval.build import build_task, check_shots
    from eval.gallery import choose_for_strip, gallery_html, strip_png
    from eval.plots import curve_png
    from eval.provenance import provenance
    from eval.report import results_of, write_atomically, write_report
    from eval.runner import Grid, run

    start = time.perf_counter()
    check_model_folder(config.model)
    tasks = {name: build_task(name, spec) for name, spec in config.task.items()}
    check_shots(tasks, config.shots)
    grid = Grid(config.shots, config.seeds, config.pictures, config.limit, config.batch_size)
    responder = load_responder(config)
    total = {cell: len(grid.query_ids(tasks[cell.task])) for cell in grid.cells(tasks)}
    with progress_bar(total, config.progress) as on_batch:
        samples, cache = run(tasks, grid, responder, on_batch)
    facts = provenance(config.model, command, config.device_name(), time.perf_counter() - start)
    results = results_of(samples, tasks, grid, cache, facts)
    out = Path(config.out)
    write_report(out, results, samples)
    write_atomically(out / "curve.png", curve_png(results))
    if config.gallery:
        write_atomically(out / "gallery.html", gallery_html(results, samples, cache.pictures, config.gallery))
        write_atomically(out / "gallery.png", strip_png(choose_for_strip(samples), cache.pictures))
    return results


class progress_bar:  # noqa: N801
    """A bar on stderr with the cell in work and the time left; a context manager giving the runner's callback."""

    def __init__(self, total: dict[Any, int], shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._id = self._progress.add_task("evaluating", total=sum(total.values()))

    def __enter__(self) -> Callable[[Any, int], None]:
        self._progress.start()
        return self._advance

    def _advance(self, cell: Any, done: int) -> None:
        what = f"{cell.task}, {cell.shots} shots, {cell.pictures}"
        self._progress.update(self._id, advance=done, description=what)

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()


def usage() -> str:
    """Help with the settings and their meaning as the YAML files tell them."""
    settings = (CONFIG / "eval.yaml").read_text()
    tasks = ", ".join(sorted(path.stem for path in (CONFIG / "task").glob("*.yaml")))
    return f"{HELP}\n{settings}\ntasks: {tasks}"


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(usage())
        return 0
    if arguments and arguments[0] == "prepare":
        from eval.prepare import main as prepare

        return prepare(arguments[1:])
    from flamingo.errors import UserError

    try:
        config = load_config(arguments)
        results = evaluate(config, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from eval.report import table

    print(table(results))
    pictures = results["pictures"]
    print(
        f"\n{pictures['shown']} pictures shown, {pictures['distinct']} distinct, {pictures['encoded']} encoded, "
        f"{results['wall_s']:.0f} s; look at {config.out}/gallery.html and {config.out}/curve.png"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
