"""The shards that are measured on: MMC4 documents as open_flamingo writes them, pairs as img2dataset does.

Nothing is downloaded: images are smooth random colours with grain, saved as JPEG of the size that web images have,
words are made up. What matters for the time is kept: 640 x 480 pixels and about 70 kB an image, 5.5 images and 24
sentences a document, one image in seven not similar enough to its sentence, captions of a dozen words.
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.shards.document import Document
from data.shards.mmc4 import Mmc4Rule, mmc4_document
from data.shards.writer import ShardWriter

POOL = 48  # different images; drawing and encoding them costs more than all that is measured


@dataclass(frozen=True)
class Material:
    """Folders of shards with the same documents: as open_flamingo has them, as raw members, and pairs."""

    mmc4: Path
    raw: Path
    pairs: Path
    texts: Path

    @classmethod
    def at(cls, folder: Path) -> Material:
        """Return the paths inside a folder."""
        return cls(folder / "mmc4", folder / "raw", folder / "pairs", folder / "texts.txt")


def image(random: np.random.Generator, width: int, height: int) -> bytes:
    """Return a JPEG with large shapes and grain."""
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = random.normal(0, 9, (height, width, 1)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=75)
    return file.getvalue()


class SentenceMaker:
    """Sentences of made-up words, the frequent ones short, as in a language."""

    def __init__(self, random: np.random.Generator, size: int = 4000) -> None:
        self.random = random
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        weights = np.arange(26, 0, -1.0) ** 1.5
        lengths = np.clip(random.normal(3, 1, size) + np.log1p(np.arange(size)) / 2, 2, 12).astype(int)
        drawn = (random.choice(26, int(length), p=weights / weights.sum()) for length in lengths)
        self.words = ["".join(letters[i] for i in word) for word in drawn]
        odds = 1 / np.arange(2, size + 2)
        self.odds = odds / odds.sum()

    def sentence(self, mean: float) -> str:
        """Return a sentence of about `mean` words."""
        number = max(2, int(self.random.normal(mean, mean / 3)))
        return (
            " ".join(self.words[i] for i in self.random.choice(len(self.words), number, p=self.odds)).capitalize() + "."
        )


def write(folder: Path, documents: int, pairs: int, shards: int, seed: int = 0) -> Material:
    """Make the shards, unless the folder has them already."""
    material = Material.at(folder)
    done = folder / f"made-{documents}-{pairs}-{shards}-{seed}"
    if done.exists():
        return material
    random = np.random.Generator(np.random.Philox(key=[seed, 0]))
    words = SentenceMaker(random)
    large = [image(random, 640, 480) for _ in range(POOL)]
    small = [image(random, 400, 300) for _ in range(POOL)]
    lines = [_document(number, random, words, large) for number in range(documents)]
    captions = [words.sentence(12) for _ in range(pairs)]
    material.mmc4.mkdir(parents=True, exist_ok=True)
    material.pairs.mkdir(exist_ok=True)
    for shard in range(shards):
        mine = range(shard, documents, shards)
        _tar(material.mmc4 / f"{shard:09d}.tar", [(f"{n:032x}.json", json.dumps(lines[n]).encode()) for n in mine])
        members = []
        for n in range(shard, pairs, shards):
            facts = {"key": f"{n:09d}", "status": "success", "caption": captions[n], "width": 400, "height": 300}
            data = small[int(random.integers(POOL))]
            members += [(f"{n:09d}.jpg", data), (f"{n:09d}.txt", captions[n].encode())]
            members.append((f"{n:09d}.json", json.dumps(facts).encode()))
        _tar(material.pairs / f"{shard:05d}.tar", members)
    with ShardWriter(material.raw, "raw", -(-documents // shards)) as writer:
        for shard in range(shards):
            for n in range(shard, documents, shards):
                nodes, inside = mmc4_document(lines[n], Mmc4Rule(similarity=-1.0))
                writer.write(Document(f"{n:032x}", nodes, [one.decode() for one in inside]))
    material.texts.write_text("\n".join([*captions, *(text for line in lines for text in line["text_list"])]))
    done.touch()
    return material


def _document(number: int, random: np.random.Generator, words: SentenceMaker, pool: list[bytes]) -> dict[str, Any]:
    sentences = max(8, int(random.normal(24, 6)))
    images = int(np.clip(random.poisson(4.5) + 1, 1, 12))
    chosen = random.choice(sentences, min(images, sentences), replace=False)
    infos, matrix = [], []
    for nth, sentence in enumerate(chosen.tolist()):
        row = random.uniform(0.05, 0.2, sentences)
        row[sentence] = random.uniform(0.22, 0.36)
        matrix.append([round(float(value), 4) for value in row])
        infos.append(
            {
                "image_name": f"{number:06d}{nth:02d}.jpg",
                "raw_url": f"http://example.com/{number}/{nth}.jpg",
                "matched_text_index": sentence,
                "matched_sim": matrix[-1][sentence],
                "image_base64": base64.b64encode(pool[int(random.integers(len(pool)))]).decode(),
            }
        )
    texts = [words.sentence(14) for _ in range(sentences)]
    return {"url": f"http://example.com/{number}", "text_list": texts, "image_info": infos, "similarity_matrix": matrix}


def _tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


def tokenizer_of(material: Material) -> Any:
    """Return a byte-level BPE tokenizer of 8,000 tokens, trained on the material's text."""
    from flamingo.training.objectives.build import train_tokenizer

    return train_tokenizer(material.texts.read_text().splitlines(), 8000)
