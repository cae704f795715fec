"""What every evaluation does around its loop: claim the output folder, show progress, write the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eval.config import EvalConfig
from eval.inference.engine import Ranks
from eval.reports.gallery import choose_for_strip, gallery_html, strip_png
from eval.reports.results import write_report
from eval.samples import Cell, Sample
from eval.task import EncodedImage
from flamingo.errors import UserError
from flamingo.files import write_atomically
from flamingo.folder_lock import lock_folder


@contextmanager
def claimed(out: str, ranks: Ranks) -> Iterator[None]:
    """Hold the output folder, on the first process."""
    with ExitStack() as held:
        if ranks.first:
            remedy = "wait for its end, stop it, or give another out="
            try:
                held.enter_context(lock_folder(Path(out), "an evaluation", remedy))
            except OSError as error:
                raise UserError(f"out={out} cannot be written ({error}); free space, or give another folder") from error
        yield


def check_out(out: Path) -> None:
    """Raise UserError unless files can be written into `out`, before anything takes long; nothing is left there."""
    try:
        with TemporaryFile(dir=next(folder for folder in (out, *out.absolute().parents) if folder.exists())):
            pass
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error}): give another folder") from None


def write_outputs(
    config: EvalConfig, results: dict[str, Any], samples: list[Sample], images: Mapping[str, EncodedImage]
) -> None:
    """Write every file except the log of responses, which exists already; `images` by their SHA-256.

    Raises:
        UserError: a file cannot be written; the answers stay in the log.
    """
    from eval.reports.plots import curve_png  # matplotlib takes a second to import

    out = Path(config.out)
    try:
        write_report(out, results, samples)
        write_atomically(out / "curve.png", curve_png({"": results}))
        if config.gallery:
            write_atomically(out / "gallery.html", gallery_html(results, samples, images, config.gallery))
            if shown := choose_for_strip(samples):  # none where no images are real
                write_atomically(out / "gallery.png", strip_png(shown, images))
    except OSError as error:
        raise UserError(
            f"the results cannot be written to out={out} ({error}): free space and give the same command again, which "
            "takes the answers from responses.jsonl"
        ) from None


@contextmanager
def progress_bar(total: dict[Cell, int], shown: bool) -> Iterator[Callable[[Cell, int], None]]:
    """Show a bar on stderr with the current cell and the time left; give the runner's callback."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        bar = progress.add_task("evaluating", total=sum(total.values()))

        def advance(cell: Cell, done: int) -> None:
            what = f"{cell.task}, {cell.strategy}, {cell.shots} shots, {cell.images}"
            progress.update(bar, advance=done, description=what)

        yield advance
