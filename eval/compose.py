"""Composes `hydra/eval.yaml`, the chosen tasks, the protocol and the command line into a checked `EvalConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flamingo.errors import UserError, first_line

CONFIG = Path(__file__).resolve().parents[1] / "hydra"


def load_config(arguments: Sequence[str]) -> Any:
    """The checked `EvalConfig` of a command line. Raises UserError in one sentence."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, ConfigTypeError, MissingMandatoryValue, OmegaConfBaseException

    from eval.config import EvalConfig

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
                for end in (place for place, letter in enumerate(key) if letter == "."):
                    if OmegaConf.select(typed, key[:end]) is None:  # a table that nothing was set in, as `support`
                        typed = OmegaConf.merge(typed, OmegaConf.from_dotlist([f"{key[:end]}={{}}"]))
                OmegaConf.update(typed, key, value, force_add=False)
        config: Any = OmegaConf.to_object(typed)
    except UserError:
        raise
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or first_line(error)
        raise UserError(f"{key} is missing; add {key}=VALUE") from None
    except (ConfigKeyError, ConfigTypeError) as error:
        raise UserError(
            f"unknown key {error.full_key!r} in the config; `python -m eval --help` lists the keys"
        ) from None
    except OmegaConfBaseException as error:
        text = first_line(error)
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
    key = str(override.key_or_group)
    if override.is_delete() or override.is_sweep_override():
        raise UserError(f"{override.input_line}: write key=value, and lists in brackets, for example shots=[0,4]")
    if key.startswith("task.") and key.split(".")[1] not in tasks:
        raise UserError(f"{key} is of a task that is not chosen; chosen are {', '.join(tasks)}")
    value = override.value()
    return key, [value] if key in ("shots", "images", "strategy") and not isinstance(value, list) else value


def _hydra_sentence(error: Exception, names: list[str]) -> str:
    """One sentence for hydra's own complaints, which run over several lines."""
    text = first_line(error)
    if "Could not override '" in text:
        return f"unknown key {text.split(chr(39))[1]!r}; `python -m eval --help` lists the keys"
    if "'task/" in text:
        return f"unknown task {text.split('task/')[1].split(chr(39))[0]!r}; the tasks are {', '.join(names)}"
    return f"the command line cannot be read: {text}"
