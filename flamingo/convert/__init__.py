"""Released checkpoints in: OpenFlamingo, Otter, IDEFICS.

`from_openflamingo`, `from_otter` and `from_idefics` take the tensors and return (model, processor);
`python -m flamingo convert` (`flamingo.convert.cli`) reads the files and writes the folder that `from_pretrained`
loads.
"""

from __future__ import annotations

from flamingo.convert.files import read_checkpoint
from flamingo.convert.idefics import from_idefics
from flamingo.convert.openflamingo import from_openflamingo
from flamingo.convert.otter import from_otter

__all__ = ["from_idefics", "from_openflamingo", "from_otter", "read_checkpoint"]
