"""Other people's data in, shards out: `python -m data prepare SOURCE`.

A source is a line in the table `SOURCES` and a module of `data.prepare.sources`. Those that compose their documents
themselves (`DRAWN`) have `add_arguments(parser)` and `run(args)`. All others hand their documents to
`data.prepare.engine`, where to begin, and have

    LAYOUT                               "interleaved" or "pairs": the layout of the shards (see docs/shards.md)
    add_arguments(parser)                adds the source's own options
    units(args) -> list[InputUnit]       independent parts of the input, always in the same order
    documents(unit, args, tally)         yields the documents of a unit; the tally counts what is left out
    begin(args, work)                    optional: makes things once, in the folder `work`, before any worker starts
"""

SOURCES = {
    "toy": "drawn scenes and characters with text that follows from the image",
    "digits": "scikit-learn's handwritten digits as documents with made-up names",
    "labelled": "your images with their names: captions, names, and made-up names that hold for a document",
    "pairs": "images with captions: tars of img2dataset (LAION, DataComp, COYO), folders, CSV or TSV",
    "mmc4": "Multimodal C4: jsonl or jsonl.zip, and the folder of its downloaded images",
    "openflamingo": "open_flamingo's MMC4 shards: tars whose JSON holds the images as base64",
    "obelics": "OBELICS' parquet, and its downloaded images",
    "mint": "MINT-1T's documents, and those of NeMo Curator: tars of texts and images in one order",
    "messages": "conversations of TRL, LLaMA-Factory, ms-swift, OpenAI, The Cauldron: JSONL, parquet, data sets",
    "llava": "LLaVA's and LLaVA-Med's conversations about an image (JSON)",
    "mimicit": "MIMIC-IT, Otter's instructions with their examples",
    "m3it": "M3IT's instructions, JSONL or parquet",
    "video": "videos with captions: tars of video2dataset, folders, frames extracted before",
    "html": "saved web pages, in the order of their DOM",
    "warc": "web pages of WARC files, in the order of their DOM",
    "deduplicate": "shards, without what repeats over the corpus: images, addresses, paragraphs",
    "hf": "data sets of the Hugging Face hub, or folders in their forms: any with a column of images",
    "folder": "a folder of Markdown or text files that show images",
}
DRAWN = ("toy", "digits", "labelled")
