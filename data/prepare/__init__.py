"""Sources: everything that `python -m data prepare` turns into shards, one module each.

A source in the table `SOURCES` is a module of this package. The drawn ones (`toy`, `digits`) have
`add_arguments(parser)` and `run(args)`. All others hand their documents to one engine (`data.prepare.engine`) and have

    LAYOUT                                "interleaved" or "pairs": which form the shards take (see docs/shards.md)
    add_arguments(parser)                 the source's own options
    units(args) -> list[Unit]             independent pieces of the input, always in the same order
    documents(unit, args, tally) -> Iterator  the documents of one piece; what is left out is counted in the tally
    begin(args, work)                     optional: what is made once, in the folder `work`, before any worker starts
"""

SOURCES = {
    "toy": "drawn scenes and characters whose text follows from the image",
    "digits": "scikit-learn's handwritten digits as documents with made-up names",
    "pairs": "images with captions: tars of img2dataset (LAION, DataComp, COYO), folders, CSV or TSV",
    "mmc4": "Multimodal C4: jsonl or jsonl.zip, and the folder of its downloaded images",
    "openflamingo": "open_flamingo's MMC4 shards: tars whose JSON holds the images as base64",
    "obelics": "OBELICS' parquet, and its downloaded images",
    "llava": "LLaVA's and LLaVA-Med's conversations about an image (JSON)",
    "mimicit": "MIMIC-IT, Otter's instructions with their examples",
    "m3it": "M3IT's instructions, JSONL or parquet",
    "video": "videos with captions: tars of video2dataset, folders, frames extracted before",
    "html": "saved web pages, in the order of their DOM",
    "warc": "web pages of WARC files, in the order of their DOM",
    "deduplicate": "shards once more, without what repeats over the corpus: images, addresses, paragraphs",
    "folder": "a folder of Markdown or text files with images in them",
}
DRAWN = ("toy", "digits")
