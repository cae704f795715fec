"""METEOR and SPICE by their authors' Java programs, which the package pycocoevalcap carries (the extra `captions`).

Nothing else here needs Java, and these are measured only where a task's `metrics` names them. Captions reach both as
`eval.metrics.ptb.caption_words` has made them, as the COCO caption scorer passes them on. METEOR's figure of a set is
of its summed statistics, not the mean of its captions' scores; SPICE's is the mean.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from eval.metrics.ptb import caption_words
from flamingo.errors import UserError

METEOR = "meteor/meteor-1.5.jar"
SPICE = "spice/spice-1.0.jar"
PARSER = "spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar"
"""SPICE parses with these; pycocoevalcap fetches them when they are first wanted, and here nothing is fetched."""
PARSER_ZIP = "nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
PROGRAMS = {"meteor": METEOR, "spice": SPICE}
MINUTES = 60


def program(metric: str, jar: str) -> Path:
    """Return the jar of a metric.

    Raises:
        UserError: Java, the package or the parser is missing; says which, and how to get it.
    """
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the metric {metric} needs pycocoevalcap: pip install 'flamingo-vlm[captions]', and Java")
    if shutil.which("java") is None:
        raise UserError(
            f"the metric {metric} needs Java, and there is no `java` on the PATH; install it, or leave the metric out"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / jar).is_file():
        raise UserError(f"the metric {metric} needs {folder / jar}, which does not exist; install pycocoevalcap again")
    lacking = [name for name in PARSER if not (folder / name).is_file()] if jar == SPICE else []
    if lacking:
        names = " and ".join(Path(name).name for name in lacking)
        # That program does nothing where the first of the two is there.
        fetch = ", and `python -m pycocoevalcap.spice.get_stanford_models` fetches them" if PARSER[0] in lacking else ""
        at = (folder / lacking[0]).parent
        raise UserError(f"the metric {metric} needs {names} in {at}; {PARSER_ZIP} has them{fetch}")
    return folder / jar


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Return METEOR 1.5 of the set and of each caption."""
    jar = program("meteor", METEOR)
    command = ["java", "-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    process = subprocess.Popen(
        command, cwd=jar.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        with process:
            each = [
                _ask(process, "SCORE", *map(caption_words, several), caption_words(caption))
                for caption, several in zip(captions, references, strict=True)
            ]
            scores = [_ask(process, "EVAL", *each), *(_line(process) for _ in each)]
        values = [float(score) for score in scores]
    except (ValueError, OSError):
        raise UserError(f"METEOR's program {jar} ended before it gave a score; does `java -version` work?") from None
    return values[-1], values[:-1]


def _ask(process: subprocess.Popen[str], *parts: str) -> str:
    """Send a line of METEOR's protocol and return its answer. Raises OSError when the program has ended."""
    assert process.stdin is not None
    process.stdin.write(" ||| ".join(part.replace("|||", "").replace("  ", " ") for part in parts) + "\n")
    process.stdin.flush()
    return _line(process)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BrokenPipeError
    return line.strip()


def spice(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return SPICE's F of each caption."""
    jar = program("spice", SPICE)
    items = [
        {"image_id": index, "test": caption_words(caption), "refs": [caption_words(other) for other in several]}
        for index, (caption, several) in enumerate(zip(captions, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        input_file, output = Path(folder) / "captions.json", Path(folder) / "scores.json"
        input_file.write_text(json.dumps(items))
        options = ["-cache", folder, "-out", str(output), "-subset", "-silent"]
        command = ["java", "-Xmx8G", "-jar", jar.name, str(input_file), *options]
        done = subprocess.run(command, cwd=jar.parent, capture_output=True, text=True, timeout=60 * MINUTES)
        if done.returncode or not output.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"SPICE's program {jar} failed ({last}); it runs with Java 8 to 11")
        scores = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in json.loads(output.read_text())}
    return [scores[index] for index in range(len(items))]
