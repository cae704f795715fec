"""The model `flamingo` of lmms-eval (the extra `lmms`).

    python -m eval.plugins.lmms_eval_model --model flamingo --tasks textvqa_val \\
        --model_args pretrained=FOLDER,shots=4,support_split=train

These are lmms_eval's own arguments. lmms-eval has no few-shot images of its own; with `shots=N` in model_args the
demonstrations are drawn here, with images and the guard on, from the split `support_split` of the task's data, or
without one from the task's few-shot, training or validation split, whichever it names first and does not ask from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eval.inference.model import FlamingoResponder
from eval.plugins import harness_prompts as harness
from eval.prompting.prompts import Decoding, Request
from flamingo.errors import UserError

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    command = "pip install --no-deps 'lmms-eval==0.7.3' loguru tenacity"
    missing = f"lmms-eval cannot be imported ({error}): beside the extras run and harness, {command}"
    if __name__ == "__main__":
        harness.stop(missing)
    raise UserError(missing) from error
if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

MOST_NEW_TOKENS = 256
"""lmms_eval's own default for tasks that set no limit."""


class FlamingoLMMs(lmms):
    """`pretrained` is a saved folder; `responder` one that is loaded already. `max_batch_size` is the harness's."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 16,
        shots: int = 0,
        seed: int = 0,
        support_split: str | None = None,
        max_batch_size: int | None = None,
        responder: FlamingoResponder | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:  # `shot=4` would otherwise be a run without any
            keys = "pretrained, device, dtype, batch_size, shots, seed, support_split"
            raise UserError(f"model_args has an unknown key {min(unknown)!r}; the keys are {keys}")
        responder = responder or harness.load(pretrained, device, dtype)
        self._engine = harness.engine_of(responder, batch_size, max_batch_size)
        self._support_split = support_split
        self._prompts = harness.HarnessPromptBuilder(responder)
        self._shots, self._seed = int(shots), int(seed)
        self._supports: dict[str, harness.HarnessSupport] = {}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (minus the log-probability, False) of each continuation; those of one question are ranked together.

        In spite of its name lmms-eval takes losses here: the answer of a multiple-choice task is the smallest.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            context, _, _, position, task, split = request.args
            groups.setdefault((task, split, position, context), []).append(index)
        asked = []
        for indices in groups.values():
            context, _, visual, position, task, split = requests[indices[0]].args
            demos, query = self._demos_and_query(context, visual, task, split, position)
            continuations = [self._continuation(requests[index]) for index in indices]
            asked.append(Request(self._prompts.build(demos, query, 0, continuations)))
        results: dict[int, tuple[float, bool]] = {}
        for indices, row in zip(groups.values(), self._engine.ask(asked), strict=True):
            assert isinstance(row, list)
            results |= {index: (-score, False) for index, score in zip(indices, row, strict=True)}
        return [results[index] for index in range(len(requests))]

    def _continuation(self, request: Instance) -> str:
        """Return the text, or what the task makes of the example."""
        given, doc_id, task, split = (request.args[index] for index in (1, 3, 4, 5))
        return str(given(self.task_dict[task][split][doc_id])) if callable(given) else given

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return continuations, cut at the first of the task's stop strings."""
        asked, stops = [], []
        for request in requests:
            context, options, visual, index, task, split = request.args
            tokens = int(options.get("max_new_tokens", MOST_NEW_TOKENS))
            temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
            demos, query = self._demos_and_query(context, visual, task, split, index)
            prompt = self._prompts.build(demos, query, tokens)
            asked.append(Request(prompt, Decoding(tokens, temperature=temperature)))
            stops.append(options.get("until"))
        return harness.ask_texts(self._engine, asked, stops)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: later rounds of such a task are made by its own code from the earlier answers."""
        raise UserError("tasks of several rounds are not supported; choose one that asks once")

    def _demos_and_query(
        self, context: str, visual: Any, task: str, split: str, index: int
    ) -> tuple[list[harness.HarnessPrompt], harness.HarnessPrompt]:
        """Return demonstrations and query; `visual` is the task's own method, so each request brings its task."""
        images = visual(self.task_dict[task][split][index])
        query = harness.shown(context, images, where=f"document {index} of task {task}, split {split}")
        if not self._shots:
            return [], query
        if task not in self._supports:
            self._supports[task] = self._support(task, visual.__self__, split)
        return self._supports[task].demos(query, f"{split} {index}", self._shots), query

    def _support(self, name: str, task: Any, asked: str) -> harness.HarnessSupport:
        """Return the split to draw from; lmms-eval's `fewshot_docs` would fall back on the questions asked."""
        config = task.config
        named = [config.fewshot_split, config.training_split, config.validation_split]
        split = self._support_split or next((split for split in named if split and split != asked), None)
        if split not in task.dataset:
            others = ", ".join(split for split in task.dataset if split != asked) or "none"
            wrong = f"task {name} has no split {split}" if split else f"task {name} names no split to draw from"
            raise UserError(
                f"shots={self._shots}: {wrong}; give support_split=NAME in model_args; its data has: {others}"
            )

        def show(example: Any) -> harness.HarnessPrompt:
            return harness.demonstration(name, task, example, task.doc_to_visual(example))

        return harness.HarnessSupport(name, task.dataset[split], show, self._seed)


class Command(FlamingoLMMs):
    """The same under lmms-eval's own command, which would go on after a UserError and end with exit status 0.

    Its evaluator (0.7.3) makes a string of anything but text, so of the pairs of `loglikelihood`, and cannot score
    multiple choice; what a `GenerationResult` holds is left as it is.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        with _one_sentence():
            super().__init__(*arguments, **options)

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """Return the scores in the harness's wrapper; a UserError ends the command as one sentence."""
        from lmms_eval.api.instance import GenerationResult

        with _one_sentence():
            return [GenerationResult(pair) for pair in super().loglikelihood(requests)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return continuations; a UserError ends the command as one sentence."""
        with _one_sentence():
            return super().generate_until(requests)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse; the UserError ends the command as one sentence."""
        with _one_sentence():
            return super().generate_until_multi_round(requests)


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        harness.stop(error)


def register(class_name: str = "FlamingoLMMs") -> None:
    """Put the model into lmms_eval's registry."""
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    manifest = ModelManifest("flamingo", simple_class_path=f"eval.plugins.lmms_eval_model.{class_name}")
    MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)


def main() -> None:
    """Run lmms_eval's own command, with this model in its registry."""
    from lmms_eval.__main__ import cli_evaluate

    register("Command")
    cli_evaluate()


if __name__ == "__main__":
    main()
