"""Evaluation during training: the loss on held-out documents, and few-shot scores by the evaluation's own loop.

Validation shares the documents among all processes. In a few-shot evaluation every process answers all queries, the
same batches in the same order: all of them gather the same weights at the same time, which needs no more memory than
training does, and the figures are those of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from data.loading.loader import MixLoader
from eval.inference.engine import Ranks
from eval.inference.model import FlamingoResponder
from eval.runner import Grid, run
from eval.samples import Sample
from eval.task import content_hash
from eval.tasks.build import build_task, check_shots
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.training.config import EvaluationOptions, RunConfig
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.objectives.protocol import Setup
from flamingo.training.validation import evaluating, validation_losses


class FewShotEvaluation:
    """Tasks and numbers of shots that are evaluated again and again."""

    def __init__(self, options: EvaluationOptions) -> None:
        """Read the tasks' data.

        Raises:
            UserError: there is no such task, data are missing, or they allow fewer demonstrations than asked for.
        """
        from eval.compose import load_config

        settings = (f"task=[{','.join(options.tasks)}]", f"data={options.data}", f"shots={options.shots}", "model=none")
        config = load_config(settings)
        self._tasks = {name: build_task(name, spec) for name, spec in config.task.items()}
        check_shots(self._tasks, options.shots)
        self._grid = Grid(options.shots, [0], ["real"], options.queries, options.batch_size)

    def agree(self, processes: Processes) -> None:
        """Compare the tasks' data. Called by every process: if they differed, the processes would deadlock.

        Raises:
            UserError: the tasks' data differ between the processes.
        """
        asked = content_hash({name: task.hash for name, task in self._tasks.items()})
        Ranks(processes.rank, processes.size).agree("the data of run.evaluation.tasks", asked)

    def scores(
        self, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, processes: Processes
    ) -> dict[str, float]:
        """Return `evaluation/<task>/<shots>` to the mean score. Every process calls it and gets the same."""
        by_cell: dict[str, list[float]] = {}
        for sample in self.samples(model, processor, processes):
            by_cell.setdefault(f"evaluation/{sample.cell.task}/{sample.cell.shots}", []).append(sample.score)
        return {cell: sum(scores) / len(scores) for cell, scores in by_cell.items()}

    def samples(
        self, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, processes: Processes
    ) -> list[Sample]:
        """Return all answers; images are encoded anew, since the resampler trains."""
        responder = FlamingoResponder(model, processor, str(processes.device))
        if processes.size > 1 and isinstance(model, FSDPModule):
            # A process whose text ends earlier (devices round differently) still has to take part in the others' steps.
            responder.generate_options["synced_gpus"] = True
        return run(self._tasks, self._grid, responder)[0]


class Evaluations:
    """The evaluations that a run makes on a schedule; they leave no trace in the training."""

    def __init__(
        self,
        options: RunConfig,
        model: nn.Module,
        setup: Setup,
        processes: Processes,
        *,
        held_out: MixLoader | None,
        few_shot: FewShotEvaluation | None,
    ) -> None:
        """Take the parts that are wanted; `held_out` and `few_shot` may be None. Created by every process.

        Raises:
            UserError: the tasks' data differ between the processes.
        """
        self._options, self._model, self._setup, self._processes = options, model, setup, processes
        self._held_out, self._few_shot = held_out, few_shot
        if few_shot is not None:
            few_shot.agree(processes)

    def due(self, step: int, *, last: bool) -> dict[str, float]:
        """Return the figures of what is due after update `step`. Called by every process."""
        values: dict[str, float] = {}
        validation, questions = self._options.validation, self._options.evaluation
        if self._held_out is not None and (last or step % validation.every == 0):
            documents = islice(_from_the_start(self._held_out), validation.batches)
            values |= validation_losses(self._model, self._setup.objective, documents, self._processes)
        if self._few_shot is not None and (last or step % questions.every == 0):
            assert isinstance(self._model, FlamingoForConditionalGeneration)
            assert self._setup.processor is not None
            with evaluating(self._model):
                values |= self._few_shot.scores(self._model, self._setup.processor, self._processes)
        return values


def _from_the_start(loader: MixLoader) -> Iterator[Mapping[str, Sequence[Mapping[str, Tensor]]]]:
    loader.step = 0
    for step in loader:
        yield {
            name: [micro_batch.tensors for micro_batch in micro_batches] for name, micro_batches in step.batches.items()
        }
