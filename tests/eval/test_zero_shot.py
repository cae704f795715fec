"""Zero-shot classification and retrieval give open_clip's own figures, for encoders of both libraries and ours."""

from __future__ import annotations

import csv
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from eval.__main__ import main
from eval.retrieval.encoder import DualEncoder, load_encoder
from eval.task import EncodedImage
from flamingo.errors import UserError
from flamingo.training.objectives.contrastive import NEW, Clip, PairTokenizer, build_clip, export
from tests.eval.worlds import COLOURS
from tests.fixtures import byte_tokenizer, png

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 24, "width": 32, "heads": 2, "layers": 1}


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that ends texts itself, as those of transformers' encoders do."""
    tokenizer = byte_tokenizer()
    end = ("<eos>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[end])
    return tokenizer


def trained_here(folder: Path, seed: int = 0) -> Path:
    """The folder that a vision run ends with."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    model, described = build_clip({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}, tokenizer)
    export(model.state_dict(), Clip(model, described, NEW, PairTokenizer(tokenizer, 24), tokenizer), folder)
    return folder


def of_open_clip(folder: Path, seed: int = 0) -> Path:
    """A folder of open_clip with its own tokenizer."""
    torch.manual_seed(seed)
    described: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": {**TEXT, "vocab_size": 49408}}
    model = open_clip.CLIP(**described)
    folder.mkdir()
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.4, 0.5, 0.5], "std": [0.3, 0.2, 0.3], "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described, "preprocess_cfg": preprocess}))
    return folder


def of_transformers(folder: Path, family: str) -> Path:
    """A folder of transformers: CLIP or SigLIP."""
    torch.manual_seed(0)
    tokenizer = ending_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_dim": 16}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    vision = {**sizes, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    config, model = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[family]
    model(config(text_config=text, vision_config=vision)).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, do_center_crop=False).save_pretrained(folder)
    return folder


MAKERS = {
    "trained_here": trained_here,
    "open_clip": of_open_clip,
    "clip": lambda folder: of_transformers(folder, "clip"),
    "siglip": lambda folder: of_transformers(folder, "siglip"),
}


def write_table(folder: Path, count: int = 48, captions: int = 1) -> Path:
    """Images of coloured noise with class and captions."""
    folder.mkdir()
    with (folder / "photos.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "image", "answer"])
        writer.writeheader()
        for number in range(count):
            name = list(COLOURS)[number % 4]
            (folder / f"{number}.png").write_bytes(png(COLOURS[name], number, side=20))
            texts = [name] if not captions else [f"{name} no {number}, {part}" for part in range(captions)]
            writer.writerow({"id": number, "image": f"{number}.png", "answer": "|".join(texts)})
    return folder / "photos.csv"


def run(tmp_path: Path, model: Path, task: str, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out = tmp_path / f"out_{model.name}"
    line = [f"task={task}", f"model={model}", f"out={out}", "device=cpu", "progress=false", *more]
    assert main(line) == 0
    assert main(["check", str(out)]) == 0
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return json.loads((out / "results.json").read_text()), samples


class Reference:
    """The same model behind the two calls that open_clip's zero-shot code makes, with its library's own functions."""

    model: Any
    transform: Any
    tokenize: Any

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        if kind in ("open_clip", "trained_here"):
            self.model, self.transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
            own = PairTokenizer(byte_tokenizer(), 24)
            self.tokenize = open_clip.get_tokenizer(f"local-dir:{folder}") if kind == "open_clip" else own
        else:
            family: Any = {"clip": CLIPModel, "siglip": SiglipModel}[kind]
            self.model = family.from_pretrained(folder)
            processor, self.tokenizer = AutoImageProcessor.from_pretrained(folder), ending_tokenizer()
            self.transform = lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]
            self.tokenize = lambda texts: torch.tensor(
                [([*ids, *[self.tokenizer.pad_token_id] * 24])[:24] for ids in self.tokenizer(texts)["input_ids"]]
            )
        self.model.eval()

    def encode_text(self, ids: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        if self.kind in ("open_clip", "trained_here"):
            return self.model.encode_text(ids, normalize=normalize)
        mask = {} if self.kind == "siglip" else {"attention_mask": (ids != self.tokenizer.pad_token_id).long()}
        pooled = self.model.get_text_features(input_ids=ids, **mask).pooler_output
        return torch.nn.functional.normalize(pooled, dim=-1)

    @torch.no_grad()
    def images(self, table: Path, ids: list[int]) -> torch.Tensor:
        files = [table.parent / f"{number}.png" for number in ids]
        pixels = torch.stack([self.transform(Image.open(file).convert("RGB")) for file in files])
        if self.kind in ("open_clip", "trained_here"):
            return self.model.encode_image(pixels, normalize=True)
        return torch.nn.functional.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


@pytest.mark.parametrize("kind", MAKERS)
def test_zero_shot_is_open_clips(kind: str, tmp_path: Path) -> None:
    """Its classifier, its logits; its own counting of hits does not run with numpy 2, so that is torch's topk here."""
    model, table = MAKERS[kind](tmp_path / kind), write_table(tmp_path / "data", captions=0)
    templates = ["a {}.", "my {} one", "{}"]
    settings = [f"task.zero_shot.source.path={table}", f"task.zero_shot.templates={json.dumps(templates)}"]
    settings += ["task.zero_shot.candidates=[red,green,blue,grey,pink,dark grey,black]"]
    results, samples = run(tmp_path, model, "zero_shot", *settings)

    names = ["red", "green", "blue", "grey", "pink", "dark grey", "black"]
    reference = Reference(model, kind)
    classifier = open_clip.build_zero_shot_classifier(reference, reference.tokenize, names, templates)
    ids = [int(sample["query_id"]) for sample in samples]
    logits = reference.images(table, ids) @ classifier
    right = logits.topk(5, dim=1).indices == torch.tensor([[number % 4] for number in ids])
    top1, top5 = float(right[:, 0].sum()), float(right.sum())
    (row,) = results["rows"]
    assert row["score"] == pytest.approx(top1 / 48)
    assert row["metrics"]["top_5"]["score"] == pytest.approx(top5 / 48)
    assert [sample["answer"] for sample in samples] == [names[at] for at in logits.argmax(1)]
    wanted = (load_encoder(str(model)).scale * logits).log_softmax(1)
    for sample, own in zip(samples, wanted, strict=True):
        own_order = own[[names.index(name) for name in sample["candidates"]]]
        np.testing.assert_allclose(sample["log_probs"], own_order, atol=2e-4)
        assert len(set(sample["candidates"])) == 7
    assert row["n"] == 48
    assert row["chance"] == pytest.approx(1 / 7)


@pytest.mark.parametrize("kind", MAKERS)
def test_retrieval_is_open_clips(kind: str, tmp_path: Path) -> None:
    metrics = pytest.importorskip("open_clip_train.train").get_clip_metrics
    model, table = MAKERS[kind](tmp_path / kind), write_table(tmp_path / "data")
    results, _ = run(tmp_path, model, "retrieval", f"task.retrieval.source.path={table}")
    reference = Reference(model, kind)
    with torch.no_grad():
        texts = reference.encode_text(
            reference.tokenize([f"{list(COLOURS)[i % 4]} no {i}, 0" for i in range(48)]), normalize=True
        )
    wanted = metrics(reference.images(table, list(range(48))), texts, torch.tensor(1.0))
    got = results["rows"][0]["metrics"]
    for k in (1, 5, 10):
        assert got[f"R@{k} image to text"]["score"] == pytest.approx(wanted[f"image_to_text_R@{k}"])
        assert got[f"R@{k} text to image"]["score"] == pytest.approx(wanted[f"text_to_image_R@{k}"])
    assert got["R@10 image to text"]["score"] > got["R@1 image to text"]["score"]


def test_several_captions_of_an_image_are_all_right(tmp_path: Path) -> None:
    """An image counts with any of its captions, a caption with its image alone; `captions_each` cuts the gallery."""
    model, table = trained_here(tmp_path / "model"), write_table(tmp_path / "data", 20, captions=3)
    settings = [f"task.retrieval.source.path={table}", "task.retrieval.captions_each=2"]
    results, samples = run(tmp_path, model, "retrieval", *settings)
    assert results["tasks"]["retrieval"]["definition"]["gallery"] == {"images": 20, "texts": 40}
    encoder = load_encoder(str(model))
    files = [EncodedImage(((table.parent / f"{number}.png").read_bytes(),)) for number in range(20)]
    captions = [f"{list(COLOURS)[number % 4]} no {number}, {part}" for number in range(20) for part in (0, 1)]
    cosines = encoder.encode_images(files) @ encoder.encode_texts(captions).T
    best = cosines.round(6).argsort(axis=1, kind="stable")[:, ::-1]
    hits = [number in best[number, :5] // 2 for number in range(20)]
    assert results["rows"][0]["metrics"]["R@5 image to text"]["score"] == pytest.approx(np.mean(hits))
    by_kind = [sample["kind"] for sample in samples]
    assert (by_kind.count("image to text"), by_kind.count("text to image")) == (20, 40)


def test_classes_of_different_sizes(tmp_path: Path) -> None:
    """The mean over classes gives each class the same weight, so it differs from the share of right answers."""
    model, table = trained_here(tmp_path / "model"), write_table(tmp_path / "data", 30, captions=0)
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *[line for line in lines[1:] if not line.endswith("red")], lines[1]]))
    results, samples = run(tmp_path, model, "zero_shot", f"task.zero_shot.source.path={table}")
    right: dict[str, list[float]] = {}
    for sample in samples:
        right.setdefault(sample["golds"][0], []).append(sample["score"])
    wanted = np.mean([np.mean(scores) for scores in right.values()])
    assert results["rows"][0]["metrics"]["mean_per_class"]["score"] == pytest.approx(wanted)
    assert results["tasks"]["zero_shot"]["definition"]["templates"] == 7


def test_long_texts_are_counted_and_limits_keep_the_gallery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, table = trained_here(tmp_path / "model"), write_table(tmp_path / "data", 12)
    table.write_text(table.read_text().replace("no 7,", "no 7 with many more words than fit,"))
    results, samples = run(tmp_path, model, "retrieval", f"task.retrieval.source.path={table}", "limit=5")
    assert results["texts_cut"] == 1
    assert "1 texts are longer" in capsys.readouterr().err
    assert len(samples) == 10
    assert results["rows"][0]["chance"] == pytest.approx(1 / 12)


@pytest.mark.parametrize("kind", MAKERS)
def test_texts_of_every_length_are_counted_rightly(kind: str, tmp_path: Path) -> None:
    encoder = load_encoder(str(MAKERS[kind](tmp_path / kind)))
    words = list(string.ascii_lowercase)
    room = {"trained_here": 23, "open_clip": 22, "clip": 23, "siglip": 23}[kind]  # without what a tokenizer adds
    for length in range(1, 26):
        before = encoder.texts_cut
        text = " ".join(words[:length]) if kind == "open_clip" else "x" * length
        encoder.encode_texts([text])
        assert encoder.texts_cut - before == (length > room), (kind, length)


def test_the_key_is_that_of_what_vectors_depend_on(tmp_path: Path) -> None:
    first, again = trained_here(tmp_path / "a"), trained_here(tmp_path / "b")
    other, foreign = trained_here(tmp_path / "c", seed=1), of_open_clip(tmp_path / "d")
    keys = [load_encoder(str(folder)).key for folder in (first, again, other, foreign)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    document = json.loads((again / "open_clip_config.json").read_text())
    document["preprocess_cfg"]["mean"] = [0.1, 0.5, 0.5]
    (again / "open_clip_config.json").write_text(json.dumps(document))
    assert load_encoder(str(again)).key != keys[0]


def test_a_batch_changes_no_vector(tmp_path: Path) -> None:
    folder = str(trained_here(tmp_path / "a"))
    images = [EncodedImage((png((number, 90, 200), number),)) for number in range(9)]
    clip = EncodedImage((images[0].frames[0], images[1].frames[0]))
    one, many = load_encoder(folder, batch_size=1), load_encoder(folder, batch_size=64)
    np.testing.assert_allclose(one.encode_images(images), many.encode_images(images), atol=1e-6)
    both = many.encode_images([clip, images[2]])
    mean = many.encode_images(images[:2]).mean(0)
    np.testing.assert_allclose(both[0], mean / np.linalg.norm(mean), atol=1e-6)


class Spoiled(DualEncoder):
    def _text_vectors(self, texts: list[str]) -> torch.Tensor:
        return torch.full((len(texts), 4), float(texts[0]))


@pytest.mark.parametrize("value", ["nan", "inf", "0"])
def test_vectors_without_direction_are_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"model=bad: 2 of 2 texts got a vector that is zero or not finite"):
        Spoiled("bad", torch.nn.Linear(1, 1), "cpu").encode_texts([value, value])


MISTAKES = {
    "shots=[0]": "shots has no effect on tasks of the kinds zero_shot and retrieval",
    "strategy=plain": "strategy has no effect",
    "task.zero_shot.metric=cider": "metric=cider has no effect on kind=zero_shot",
    "task.zero_shot.demos=fixed": "support and demos have no effect",
    "task.zero_shot.templates=[a photo]": "write {} once",
    "task.zero_shot.templates=[]": "templates",
    "task.zero_shot.candidates=[red,green]": "24 of 48 items are of a class that is not among the 2 candidates",
    "task.zero_shot.class_names=openai_imagenet": "1,000 classes",
    "model=nowhere": "nowhere",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_mistakes_end_in_a_sentence(setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, table = trained_here(tmp_path / "model"), write_table(tmp_path / "data", captions=0)
    line = ["task=zero_shot", f"model={model}", f"out={tmp_path / 'out'}", "progress=false", "device=cpu"]
    assert main([*line, f"task.zero_shot.source.path={table}", setting]) == 2
    error = capsys.readouterr().err
    assert MISTAKES[setting] in error
    assert error.startswith("error: ")
    assert not (tmp_path / "out" / "results.json").exists()


def test_models_that_cannot_do_it(tmp_path: Path) -> None:
    folder = trained_here(tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="the tokenizer is missing"):
        load_encoder(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no encoder"):
        load_encoder(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"ViT-B-32 has no weights: give ViT-B-32/TAG; the tags are .*openai"):
        load_encoder("ViT-B-32")
    for name, model_type in (("flamingo", "flamingo"), ("gpt2", "gpt2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match="text encoder"):
        load_encoder(str(tmp_path / "flamingo"))
    with pytest.raises(UserError):
        load_encoder(str(tmp_path / "gpt2"))
    damaged = trained_here(tmp_path / "damaged")
    (damaged / "open_clip_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded by open_clip"):
        load_encoder(str(damaged))


def test_tasks_of_prompts_and_of_vectors_are_run_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task=[csv,zero_shot]", "model=x", "task.csv.source.path=x", "task.zero_shot.source.path=x"]) == 2
    assert "run them apart" in capsys.readouterr().err
