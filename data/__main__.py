"""`python -m data prepare|instruct|merge|inspect|verify|index|bench|simulate|assets`: makes shards, looks, measures.

A mistake ends with one sentence on stderr and status 2; `verify` ends with 1 when it finds faults.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from data.prepare import DRAWN, SOURCES
from data.shards.index import TarIndex, build_index, index_path
from data.shards.samples import JSON, TEXT
from flamingo.errors import UserError
from flamingo.files import write_atomically
from flamingo.terminal import printable

TOOLS = {
    "bench": "this loader and open_flamingo's own on the same shards",
    "simulate": "what plan, start, resuming and reading cost for a corpus of any size",
    "instruct": "conversations about images, by a language model, from captions and the sentences around them",
    "assets": "fetch the pretrained backbones and the drawings of the real demonstration, each pinned by its hash",
}
MODULES = {
    "bench": "data.bench.table",
    "simulate": "data.bench.simulate",
    "instruct": "data.instruct.command",
    "assets": "data.assets",
}
TASK = "a task's training split is written with the evaluation's prompt: python -m eval shards task={name} --out DIR"


def parser(source: str | None = None, inspecting: bool = False) -> argparse.ArgumentParser:
    """Return the command line's parser. Only the command that is run imports its options, so that all start quickly."""
    top = argparse.ArgumentParser(prog="python -m data", description=(__doc__ or "").split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write shards from a source")
    sources = prepare.add_subparsers(dest="source", required=True)
    for name, about in SOURCES.items():
        command = sources.add_parser(name, help=about, description=about)
        command.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
        if name == source:
            if name not in DRAWN:
                import_module("data.prepare.engine").add_arguments(command)
            import_module(f"data.prepare.sources.{name}").add_arguments(command)
    merge = commands.add_parser("merge", help="join what `prepare --part i/n` wrote")
    merge.add_argument("folder", nargs="+", metavar="DIR")
    merge.add_argument("--out", metavar="DIR", help="folder for the whole (default: the first DIR)")
    inspect = commands.add_parser("inspect", help="one document as a person would look at it")
    inspect.add_argument("shard")
    inspect.add_argument("--row", type=int, default=0, help="which document, counted from 0")
    inspect.add_argument("--html", metavar="FILE", help="write the document with its images instead of printing it")
    if inspecting:
        import_module("data.tools.show_sampled").add_sampling_arguments(inspect)
    check = commands.add_parser("verify", help="find faults; status 1 when there are any")
    check.add_argument("path", nargs="+", metavar="DIR|SHARD")
    index = commands.add_parser("index", help="write the index of tars made elsewhere, and a folder's catalogue")
    index.add_argument("shard", nargs="+", metavar="SHARD|DIR")
    for name, about in TOOLS.items():
        command = commands.add_parser(name, help=about, description=about)
        if name == source:
            import_module(MODULES[name]).add_arguments(command)
    return top


def inspect(args: argparse.Namespace) -> int:
    """Print a document, or write it as HTML."""
    from data.remote.copies import shard_copy
    from data.shards.document import Document
    from data.shards.writer import read_document
    from data.tools.show import document_as_html, document_as_text

    with shard_copy(args.shard) as shard:
        document = read_document(shard, args.row)
    where = f"{args.shard}, row {args.row}"
    as_text: Callable[[Document, str], str] = document_as_text
    as_html: Callable[[Document, str], str] = document_as_html
    if args.sampled:
        from data.tools.show_sampled import sample_document, sampled_as_html, sampled_as_text

        row = sample_document(document, args)
        as_text, as_html = partial(sampled_as_text, row), partial(sampled_as_html, row)
    if args.html is None:
        print(printable(as_text(document, where)))
    else:
        write_atomically(Path(args.html), as_html(document, where))
        print(printable(args.html))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Print the faults, one a line."""
    from data.tools.verify import verify as faults

    total = 0
    for path in args.path:
        for fault in faults(path):
            print(printable(fault))
            total += 1
    print(f"{total} faults" if total else "no faults", file=sys.stderr)
    return 1 if total else 0


def _lacking(index: TarIndex) -> str:
    """Return how many samples no dataset of pairs can use, since a tar made elsewhere may be named otherwise."""
    images = int((index.images_per_row == 0).sum())
    texts = int((~(index.rows_with(JSON) | index.rows_with(TEXT))).sum())
    parts = [f"{images} without an image"] * bool(images) + [f"{texts} without text or JSON"] * bool(texts)
    return f"; {', '.join(parts)}" if parts else ""


def _index_remote(url: str) -> None:
    """Build the index of every shard of a store that a URL stands for, and put it beside the shard."""
    from data.remote.copies import shard_copy
    from data.shard_store import resolve_shards
    from data.shards.places import is_store, place, send

    if not is_store(url):
        raise UserError(f"cannot write an index beside {url}; index the shard where it is, or a copy of it")
    for shard in resolve_shards([url]):
        with shard_copy(shard) as copy:
            built = build_index(copy)
            built.save(index_path(copy))
            send(index_path(copy), place(f"{shard}.idx"))
        print(f"{shard}.idx: {len(built)} samples, {len(built.offset)} members{_lacking(built)}")


def index(args: argparse.Namespace) -> int:
    """Build the index of every shard named."""
    from data.remote.download import is_remote
    from data.shard_store import save_index, write_catalogue

    for name in args.shard:
        if is_remote(name):
            _index_remote(name)
            continue
        path = Path(name)
        heads = {}
        for shard in sorted(path.glob("*.tar")) if path.is_dir() else [path]:
            built = build_index(shard)
            if path.is_dir():
                built.save(index_path(shard))
            else:
                save_index(shard, built)
            heads[shard.name] = built.head()
            line = f"{index_path(shard)}: {len(built)} samples, {len(built.offset)} members{_lacking(built)}"
            print(printable(line))
        if path.is_dir():
            if not heads:
                raise UserError(f"folder {path} has no shards (*.tar) to index")
            print(printable(f"{write_catalogue(path, heads)}: {len(heads)} shards"))
    return 0


def main(argv: list[str]) -> int:
    """Run one command and return the exit status."""
    if argv[:2] == ["prepare", "dedupe"]:
        argv = ["prepare", "deduplicate", *argv[2:]]
    if argv[:2] == ["prepare", "task"]:
        print(f"error: {TASK.format(name=argv[2] if len(argv) > 2 else 'NAME')}", file=sys.stderr)
        return 2
    source = argv[1] if len(argv) > 1 and argv[0] == "prepare" and argv[1] in SOURCES else None
    if argv and argv[0] in TOOLS:
        source = argv[0]
    args = parser(source, argv[:1] == ["inspect"]).parse_args(argv)
    try:
        if args.command == "prepare":
            engine = import_module("data.prepare.engine")
            with engine.claimed(args):
                if args.source in DRAWN:
                    import_module(f"data.prepare.sources.{args.source}").run(args)
                else:
                    engine.run(args.source, args)
            return 0
        if args.command == "merge":
            import_module("data.prepare.merge").merge(args.folder, args.out)
            return 0
        if args.command in TOOLS:
            return import_module(MODULES[args.command]).run(args)
        return {"inspect": inspect, "verify": verify, "index": index}[args.command](args)
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
