"""`python -m eval task=[toy_caption,toy_binding] shots=[0,4] model=FOLDER out=FOLDER`: few-shot evaluation.

hydra composes `hydra/eval.yaml`, the chosen `hydra/task/*.yaml` and the command line; the result is checked against
typed classes before any data or model is read. hydra is used as a function, not as a decorator: the working folder does
not change, and every mistake ends as one sentence on stderr with exit status 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from flamingo.configs.compose import CONFIGS
from flamingo.errors import UserError
from flamingo.terminal import printable

FINISHED = ("report", "compare", "check", "export")
"""Commands of eval.reports.commands on what earlier runs wrote."""
HELP = """python -m eval model=FOLDER task=[NAME,...] [key=value ...]

few-shot evaluation: writes results.json, samples.jsonl, curve.png, gallery.html and gallery.png into out. Started again
after a kill it continues from out/responses.jsonl; torchrun --nproc-per-node N -m eval ... shares it between processes.

python -m eval report FOLDER [FOLDER ...] [out=FOLDER]     tables, curves and risk-coverage of runs, as one page
python -m eval compare FIRST SECOND [out=FILE.json]        paired differences with intervals and tests
python -m eval check FOLDER ...                            complete, and do the results follow from the samples?
python -m eval export FOLDER format=vqa|vizwiz|captions to=FILE [ids=QUESTIONS.json] [task= shots= seed= strategy=]

python -m eval rate RUN [RUN] out=FOLDER [axes=clinician|lay|FILE.yaml] [raters=2] [overlap=1] [questions=N] [seed=0]
python -m eval rate --read FILES [key=FILE] [out=FOLDER]   shares, agreement and wins of filled sheets
python -m eval judge RUN [RUN] url=URL model=NAME out=FOLDER [prompt=text|llava_med|FILE.yaml] [context=FILE]

python -m eval prepare TASK --from FOLDER     which files of a data set are missing, and where they are published
python -m eval shards task=NAME --out DIR     a task's training split as shards, with the task's own prompt

python -m eval index FOLDER|SHARD model=ENCODER to=FOLDER    vectors of images, for search and for demonstrations
python -m eval search "two red squares" index=FOLDER [k=10]  the nearest images; image=FILE instead of a text

settings (hydra/eval.yaml), then tasks (hydra/task/): task.NAME.KEY=VALUE changes a task.
"""


def usage() -> str:
    """Return the help text: commands, then the settings and their meaning from the YAML files."""
    settings = (CONFIGS / "eval.yaml").read_text()
    tasks = ", ".join(sorted(path.stem for path in (CONFIGS / "task").glob("*.yaml")))
    return f"{HELP}\n{settings}\ntasks: {tasks}"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    if arguments and arguments[0] == "shards":
        from eval.training_shards import main as shards

        return shards(arguments[1:])
    if any(argument in ("-h", "--help") for argument in arguments):
        print(usage())
        return 0
    if arguments and arguments[0] == "prepare":
        from eval.check_data import main as prepare

        return prepare(arguments[1:])
    if arguments and arguments[0] in ("index", "search"):
        from eval.retrieval.commands import main as searching

        return searching(arguments)
    if arguments and arguments[0] in FINISHED:
        from eval.reports.commands import main as finished

        return finished(arguments)
    if arguments and arguments[0] in ("rate", "judge"):
        from eval.judging.command import judge_runs
        from eval.rating.command import rate
        from eval.reports.commands import told

        return told(rate if arguments[0] == "rate" else judge_runs, arguments[1:])
    try:
        from eval.compose import load_config

        config = load_config(arguments)
        if config.compares_vectors:
            from eval.retrieval.launch import evaluate_encoder as evaluate
        else:
            from eval.launch import evaluate  # imports torch and the models, so only once the settings are right

        results = evaluate(config, arguments)
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") != "0":
        return 0
    from eval.reports.results import table

    print(printable(table(results)))
    images, responses = results["images"], results["responses"]
    if responses["from_log"]:
        print(f"\n{responses['from_log']} answers came from {config.out}/responses.jsonl, {responses['asked']} are new")
    print(
        f"\n{images['shown']} images shown, {images['distinct']} distinct, {images['encoded']} encoded, "
        f"{results['wall_s']:.0f} s; look at {config.out}/gallery.html and {config.out}/curve.png"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
