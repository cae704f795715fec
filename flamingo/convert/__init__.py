"""Released checkpoints of OpenFlamingo, Otter and IDEFICS in, a model and its processor out.

Tensors come in under the names of the project that released them; what goes out is one of our models, always with the
connector `perceiver`, and its processor, with every weight accounted for. Begin at `openflamingo.py` for the mapping of
one family, at `cli.py` for `python -m flamingo convert`, which reads the files and writes the folder.

The names exported here are imported on first use, so that the command line and the presets are cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flamingo.convert.files import read_checkpoint as read_checkpoint
    from flamingo.convert.idefics import from_idefics as from_idefics
    from flamingo.convert.openflamingo import from_openflamingo as from_openflamingo
    from flamingo.convert.otter import from_otter as from_otter

_WHERE = {
    "from_idefics": "idefics",
    "from_openflamingo": "openflamingo",
    "from_otter": "otter",
    "read_checkpoint": "files",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'flamingo.convert' has no attribute {name!r}")
    return getattr(import_module(f"flamingo.convert.{_WHERE[name]}"), name)
