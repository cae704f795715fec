"""The model `flamingo` of lm-evaluation-harness (`pip install lm-eval`, the extra `harness`).

    python -m eval.plugins.lm_eval_model --model flamingo --model_args pretrained=FOLDER --tasks medqa_4options
    python -m eval.plugins.lm_eval_model --model flamingo --model_args pretrained=FOLDER,shots=4 --tasks mmmu_val

These are lm_eval's own arguments. Its few-shot examples (`--num_fewshot`) come without images; with `shots=N` in
model_args the demonstrations are drawn here, from the task's own few-shot split and with their images. Candidates of
one question are ranked together after one run of their prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eval.inference.model import FlamingoResponder
from eval.plugins import harness_prompts as harness
from eval.prompting.prompts import Completion, Decoding, Request
from flamingo.errors import UserError

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    missing = f"lm-eval cannot be imported ({error}): pip install 'flamingo-vlm[harness]'"
    if __name__ == "__main__":
        harness.stop(missing)
    raise UserError(missing) from error
if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MOST_NEW_TOKENS = 256
"""lm_eval's own default for tasks that set no limit."""


@register_model("flamingo")
class FlamingoLM(LM):
    """`pretrained` is a saved folder; `responder` one that is loaded already. `include_path`: folder of own tasks."""

    MULTIMODAL = True

    def __init__(
        self,
        pretrained: str = "",
        *,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        shots: int = 0,
        seed: int = 0,
        include_path: str | None = None,
        tasks: Mapping[str, Any] | None = None,
        responder: FlamingoResponder | None = None,
    ) -> None:
        super().__init__()
        if responder is None:
            responder = harness.load(pretrained, device, dtype)
        self._engine = harness.engine_of(responder, batch_size, max_batch_size)
        self._prompts = harness.HarnessPromptBuilder(responder)
        self._shots, self._seed, self._include_path = int(shots), int(seed), include_path
        self._tasks: dict[str, Any] = dict(tasks or {})
        self._supports: dict[str, harness.HarnessSupport] = {}

    @property
    def tokenizer_name(self) -> str:
        """For the names of lm_eval's own request cache."""
        return "flamingo"

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (log-probability, greedy or not) of each continuation.

        Greedy decoding is compared only for questions with one continuation (as in LAMBADA); with several, no metric
        asks for it and the value is False.
        """
        groups: dict[tuple[str | None, int | None, str], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault((request.task_name, request.doc_id, request.args[0]), []).append(index)
        asked, checks = [], []
        for indices in groups.values():
            first = requests[indices[0]]
            demos, query = self._demos_and_query(first)
            prompt = self._prompts.build(demos, query, 0, [requests[index].args[1] for index in indices])
            asked.append(Request(prompt))
            if len(indices) == 1:
                checks.append((indices[0], Request(prompt, Decoding(len(prompt.candidates[0])))))
        scores = self._engine.ask(asked)
        results: dict[int, tuple[float, bool]] = {}
        for indices, row in zip(groups.values(), scores, strict=True):
            assert isinstance(row, list)
            results |= {index: (score, False) for index, score in zip(indices, row, strict=True)}
        for (index, request), completion in zip(checks, self._engine.ask([r for _, r in checks]), strict=True):
            assert isinstance(completion, Completion)
            tokens = len(request.prompt.candidates[0])
            best = -float("inf") if completion.log_prob is None else completion.log_prob * tokens
            results[index] = (results[index][0], abs(results[index][0] - best) < 1e-3 * tokens)
        return [results[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-probabilities of whole texts; one beyond the context is cut into parts without overlap."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        asked: list[Request] = []
        owners = []
        for index, request in enumerate(requests):
            most = (self._prompts.context or 2048) - 1
            token_windows = get_rolling_token_windows(
                self._prompts.tokens(request.args[0]), self._prompts.first_token, most, 1
            )
            for before, own in map(make_disjoint_window, token_windows):
                asked.append(Request(self._prompts.bare(before, own)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, row in zip(owners, self._engine.ask(asked), strict=True):
            assert isinstance(row, list)
            totals[index] += row[0]
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return continuations, cut at the first of the task's stop strings."""
        asked, stops = [], []
        for request in requests:
            options: dict[str, Any] = dict(request.args[1])
            demos, query = self._demos_and_query(request)
            tokens = int(options.get("max_gen_toks", options.get("max_new_tokens", MOST_NEW_TOKENS)))
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            prompt = self._prompts.build(demos, query, tokens)
            draw = int(request.repeats or 0) if temperature else 0
            how = Decoding(tokens, temperature=temperature, top_p=float(options.get("top_p", 1.0)), draw=draw)
            asked.append(Request(prompt, how))
            stops.append(options.get("until"))
        return harness.ask_texts(self._engine, asked, stops)

    def _demos_and_query(self, request: Instance) -> tuple[list[harness.HarnessPrompt], harness.HarnessPrompt]:
        extra: Any = request.args[2] if len(request.args) > 2 else None
        where = f"document {request.doc_id} of task {request.task_name}"
        query = harness.shown(request.args[0], (extra or {}).get("visual"), where=where)
        if self._shots == 0:
            return [], query
        support = self._support(str(request.task_name))
        return support.demos(query, str(request.doc_id), self._shots), query

    def _support(self, name: str) -> harness.HarnessSupport:
        if name not in self._supports:
            task = self._task(name)
            examples = list(task.fewshot_docs())
            if not examples:
                raise UserError(f"shots={self._shots}: task {name} has no few-shot split to draw from")

            def show(doc: Any) -> harness.HarnessPrompt:
                visual = task.doc_to_image(doc) if task.config.doc_to_image is not None else None
                return harness.demonstration(name, task, doc, visual)

            self._supports[name] = harness.HarnessSupport(name, examples, show, self._seed)
        return self._supports[name]

    def _task(self, name: str) -> Any:
        """Return the harness's task object, which knows how its examples are shown."""
        if name not in self._tasks:
            from lm_eval.tasks import TaskManager

            self._tasks |= TaskManager(include_path=self._include_path).load([name])["tasks"]
        return self._tasks[name]


def main() -> None:
    """Run lm_eval's own command, with this model in its registry."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        harness.stop(error)


if __name__ == "__main__":
    main()
