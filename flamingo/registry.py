"""Tells transformers' Auto classes what a Flamingo is, without importing them.

`import flamingo` is cheap: data workers do it, and never need a model. So the classes are registered when transformers
looks for a class that is not its own: its tables of those are replaced by ones that register ours first. Where
transformers is not imported yet, that is done as soon as its tables are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TABLES = {
    "transformers.models.auto.configuration_auto": "CONFIG_MAPPING",
    "transformers.models.auto.processing_auto": "PROCESSOR_MAPPING",
    "transformers.models.auto.image_processing_auto": "IMAGE_PROCESSOR_MAPPING",
    "transformers.models.auto.video_processing_auto": "VIDEO_PROCESSOR_MAPPING",
    "transformers.models.auto.modeling_auto": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
}
_state = {"registering": False, "done": False}


def register() -> None:
    """Import the classes that register themselves, once."""
    if _state["done"] or _state["registering"]:
        return
    _state["registering"] = True
    try:
        import flamingo.modeling
        import flamingo.processor  # noqa: F401

        _state["done"] = True
    except ImportError as error:
        if "partially initialized" not in str(error):  # else transformers is still being imported: at the next look
            raise
    finally:
        _state["registering"] = False


class Table(dict[Any, Any]):
    """Classes that are not transformers' own; ours are among them as soon as anybody looks."""

    def __getitem__(self, key: Any) -> Any:
        register()
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        register()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[Any]:
        register()
        return super().__iter__()

    def __len__(self) -> int:
        register()
        return super().__len__()

    def keys(self) -> Any:
        """Return the keys."""
        register()
        return super().keys()

    def values(self) -> Any:
        """Return the classes."""
        register()
        return super().values()

    def items(self) -> Any:
        """Return both."""
        register()
        return super().items()


def prepare(module: ModuleType) -> None:
    """Replace a module's table of classes that are not transformers' own."""
    mapping = getattr(module, TABLES[module.__name__], None)
    content = getattr(mapping, "_extra_content", None)
    if isinstance(content, dict) and not isinstance(content, Table):
        mapping._extra_content = Table(content)  # type: ignore[union-attr]


class _Preparing(Loader):
    """Loads one of the modules as its own loader does, and prepares it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does it."""
        made: ModuleType | None = self.inner.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader does it; then the table is replaced."""
        self.inner.exec_module(module)
        prepare(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Finder(MetaPathFinder):
    """Finds the modules with the tables."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the module's own spec with a loader that prepares it, None for every other module."""
        if fullname not in TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Preparing(spec.loader)
        return spec


def install() -> None:
    """Prepare the tables that are imported already, and the others when they are."""
    for name in TABLES:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, TABLES[name]):
            prepare(module)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
