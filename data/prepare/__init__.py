"""Sources: everything that `python -m data prepare` turns into shards, one module each.

A source in the table `SOURCES` is a module of this package. The drawn ones (`toy`, `digits`) have
`add_arguments(parser)` and `run(args)`. All others hand their pages to one engine (`data.prepare.engine`) and have

    LAYOUT                                "interleaved" or "pairs": which form the shards take (see docs/shards.md)
    add_arguments(parser)                 the source's own options
    units(args) -> list[Unit]             independent pieces of the input, always in the same order
    pages(unit, args, tally) -> Iterator  the pages of one piece; what is left out is counted in the tally
    begin(args, work)                     optional: what is made once, in the folder `work`, before any worker starts
"""

SOURCES = {
    "toy": "drawn scenes and characters whose text follows from the picture",
    "digits": "scikit-learn's handwritten digits as pages with made-up names",
    "pairs": "pictures with captions: tars of img2dataset (LAION, DataComp, COYO), folders, CSV or TSV",
    "mmc4": "Multimodal C4: jsonl or jsonl.zip, and the folder of its downloaded pictures",
    "openflamingo": "open_flamingo's MMC4 shards: tars whose JSON holds the pictures as base64",
    "obelics": "OBELICS' parquet, and its downloaded pictures",
    "llava": "LLaVA's and LLaVA-Med's conversations about a picture (JSON)",
    "mimicit": "MIMIC-IT, Otter's instructions with their examples",
    "m3it": "M3IT's instructions, JSONL or parquet",
    "video": "videos with captions: tars of video2dataset, folders, frames extracted before",
    "html": "saved web pages, in the order of their DOM",
    "warc": "web pages of WARC files, in the order of their DOM",
    "deduplicate": "shards once more, without what repeats over the corpus: pictures, addresses, paragraphs",
    "folder": "a folder of Markdown or text files with pictures in them",
}
DRAWN = ("toy", "digits")
