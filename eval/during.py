"""Evaluation in the middle of training: the loss on held-out pages, and few-shot scores by the evaluation's own loop.

Validation shares the pages among all processes; probes are for a run on one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from data.loader import MixLoader
from eval.build import build_task, check_shots
from eval.model import FlamingoResponder
from eval.runner import Grid, run
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.training.config import RunConfig
from flamingo.training.parallel import Processes
from flamingo.training.run_options import ProbeOptions
from flamingo.training.setups import Setup
from flamingo.training.validation import evaluating, validation_losses


class Probe:
    """Some tasks and numbers of shots, ready to be asked again and again."""

    def __init__(self, options: ProbeOptions) -> None:
        """Reads the tasks' data.

        Raises:
            UserError: no such task, data are missing, or they give fewer demonstrations than asked for.
        """
        from eval.__main__ import load_config

        settings = (f"task=[{','.join(options.tasks)}]", f"data={options.data}", f"shots={options.shots}", "model=none")
        config = load_config(settings)
        self._tasks = {name: build_task(name, spec) for name, spec in config.task.items()}
        check_shots(self._tasks, options.shots)
        self._grid = Grid(options.shots, [0], ["real"], options.queries, options.batch_size)

    def scores(
        self, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, device: str
    ) -> dict[str, float]:
        """`probe/<task>/<shots>` to the mean score; pictures are encoded anew, since the resampler trains."""
        if isinstance(model, FSDPModule):
            for method in ("encode_media", "score_candidates", "generate"):
                register_fsdp_forward_method(model, method)
        samples, _ = run(self._tasks, self._grid, FlamingoResponder(model, processor, device))
        by_cell: dict[str, list[float]] = {}
        for sample in samples:
            by_cell.setdefault(f"probe/{sample.cell.task}/{sample.cell.shots}", []).append(sample.score)
        return {cell: sum(scores) / len(scores) for cell, scores in by_cell.items()}


class Evaluations:
    """What a run asks of its model on a schedule; nothing of it is left behind in the run."""

    def __init__(
        self,
        options: RunConfig,
        model: nn.Module,
        setup: Setup,
        processes: Processes,
        *,
        held_out: MixLoader | None,
        probe: Probe | None,
    ) -> None:
        """`held_out` and `probe`: None where they are not wanted."""
        self._options, self._model, self._setup, self._processes = options, model, setup, processes
        self._held_out, self._probe = held_out, probe

    def values(self, step: int, *, last: bool) -> dict[str, float]:
        """What is due after update `step`. Called by every process."""
        found: dict[str, float] = {}
        validation, questions = self._options.validation, self._options.probe
        if self._held_out is not None and (last or step % validation.every == 0):
            pages = islice(_from_the_start(self._held_out), validation.batches)
            found |= validation_losses(self._model, self._setup.objective, pages, self._processes)
        if self._probe is not None and (last or step % questions.every == 0):
            assert isinstance(self._model, FlamingoForConditionalGeneration)
            assert self._setup.processor is not None
            with evaluating(self._model):
                found |= self._probe.scores(self._model, self._setup.processor, str(self._processes.device))
        return found


def _from_the_start(loader: MixLoader) -> Iterator[Mapping[str, Sequence[Mapping[str, Tensor]]]]:
    loader.step = 0
    for step in loader:
        yield {name: [piece.tensors for piece in pieces] for name, pieces in step.batches.items()}
