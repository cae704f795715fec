"""Toy documents: splits share nothing, text follows its images, any number of processes writes the same shards."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from data.prepare.sources.toy import add_arguments, prepare, run
from data.shards.writer import Image, Text, read_document, read_documents, read_manifest
from data.toy.documents import make_documents
from data.toy.drafts import FAMILIAR, MAKERS, binding_document, class_name, familiar_name, make_draft
from data.toy.names import FIRST, SECOND, draw_names, names
from data.toy.streams import stream
from data.toy.text_documents import binding_text, repeat_text
from data.toy.vocabulary import build_tokenizer, words, write_tokenizer
from flamingo.errors import UserError

TINY = dict.fromkeys(MAKERS, 6)


def test_heldout_names_are_new_combinations_of_known_syllables() -> None:
    train, heldout = names("train"), names("heldout")
    assert not set(train) & set(heldout)
    assert {name[:2] for name in heldout} <= {name[:2] for name in train} <= set(FIRST)
    assert {name[2:] for name in heldout} <= {name[2:] for name in train} <= set(SECOND)
    assert not set(FIRST) & set(SECOND)
    assert len(heldout) > 200


def test_names_of_a_document_share_no_syllable() -> None:
    for i in range(100):
        chosen = draw_names(stream(1, "n", i), "train", 4)
        assert len({n[:2] for n in chosen}) == len({n[2:] for n in chosen}) == 4
    with pytest.raises(ValueError, match="0 to 12"):
        draw_names(stream(1, "n", 0), "train", 13)


def test_tokenizer_has_a_token_for_every_word_and_two_for_every_name(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    assert [w for w in words() for s in ("", " ") if len(tokenizer.encode(s + w).ids) != 1] == []
    assert [n for split in ("train", "heldout") for n in names(split) if len(tokenizer.encode(" " + n).ids) != 2] == []
    text = "what colour is the circle? red\nHello, Wörld 🦩"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert (tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>")) == (0, 1)
    write_tokenizer(tmp_path)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(" kibo") == tokenizer.encode(" kibo").ids
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def test_toy_text_needs_no_bytes() -> None:
    """Every text of every document is made of whole words and syllables: no token is a single letter but "a"."""
    tokenizer = build_tokenizer()
    for kind in sorted(set(MAKERS) - {"glyph_pairs"}):
        for i in range(40):
            for part in make_draft(1, "train", kind, i).parts:
                if isinstance(part[0], str):
                    tokens = tokenizer.encode(part[0]).tokens
                    assert [t for t in tokens if len(t.strip("Ġ")) == 1 and t.strip("Ġ") not in "a?Ċ"] == [], part


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_documents_are_pure_functions_of_their_index(kind: str) -> None:
    together = make_documents(1, "train", kind, range(6))
    alone = make_documents(1, "train", kind, range(4, 5))[0]
    assert (together[4].nodes, together[4].meta) == (alone.nodes, alone.meta)
    other = make_draft(1, "heldout", kind, 4)
    assert (
        make_draft(1, "train", kind, 4).parts != other.parts
        or together[4].images != make_documents(1, "heldout", kind, range(4, 5))[0].images
    )
    shown = {frame for node in alone.nodes if isinstance(node, Image) for frame in node.frames}
    assert shown == set(range(len(alone.images)))


def test_training_and_heldout_binding_share_neither_names_nor_classes() -> None:
    train = [binding_document(stream(1, "b", i), "train").meta for i in range(200)]
    heldout = [binding_document(stream(2, "b", i), "heldout").meta for i in range(200)]
    for key in ("classes", "names"):
        assert not {x for m in train for x in m[key]} & {x for m in heldout for x in m[key]}
    assert min(c for m in train for c in m["classes"]) >= FAMILIAR


def test_heldout_binding_is_balanced_and_shows_every_image_once() -> None:
    for i in range(50):
        draft = binding_document(stream(2, "b", i), "heldout", ways=2, shots=4)
        said = [part[0].strip() for part in draft.parts if isinstance(part[0], str)]
        assert [said[:-1].count(name) for name in draft.meta["names"]] == [4, 4]
        assert said[-1] == draft.meta["answer"]
        assert len(draft.images) == 9


def test_a_name_counts_in_the_loss_from_its_second_mention_on() -> None:
    draft = binding_document(stream(1, "b", 3), "train")
    seen: set[str] = set()
    for part in draft.parts:
        if isinstance(part[0], str):
            assert part[1] == (part[0] in seen)
            seen.add(part[0])


def test_repeats_show_the_very_same_image() -> None:
    always = binding_document(stream(1, "b", 3), "train", repeats=1.0)
    assert len(always.images) == len({p for p in always.parts if not isinstance(p[0], str)}) <= 2
    never = binding_document(stream(1, "b", 3), "train", repeats=0.0)
    assert len(never.images) == 7


def test_familiar_classes_keep_their_names_and_all_count() -> None:
    for i in range(50):
        draft = make_draft(1, "train", "naming", i)
        assert draft.meta["names"] == [familiar_name(c) for c in draft.meta["classes"]]
        assert all(part[1] for part in draft.parts if isinstance(part[0], str))
    assert len({familiar_name(c) for c in range(FAMILIAR)}) == FAMILIAR


def test_class_names_tell_the_classes_apart() -> None:
    assert len({class_name(c) for c in range(1000)}) > 990


def test_binding_in_words_repeats_the_descriptions() -> None:
    nodes = binding_text(stream(1, "t", 0), ways=4)
    spoken: dict[str, str] = {}
    for (description, in_loss), (name, name_in_loss) in zip(nodes[::2], nodes[1::2], strict=True):
        assert not in_loss
        assert name_in_loss == (name in spoken.values())
        assert spoken.setdefault(description.strip(), name) == name


def test_a_repeated_line_is_repeated() -> None:
    ((text, in_loss),) = repeat_text(stream(1, "t", 0))
    first, second = text.split("\n")
    assert first == second
    assert in_loss


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="train or heldout"):
        make_draft(0, "test", "captions", 0)


def test_prepare_writes_folders_that_read_back(tmp_path: Path) -> None:
    written = prepare(tmp_path, train=TINY, heldout=TINY, documents_per_shard=4)
    assert set(written) == {f"{split}/{kind}" for split in ("train", "heldout") for kind in MAKERS}
    for folder, count in written.items():
        kind = folder.split("/")[1]
        part = read_manifest(tmp_path / folder)["parts"][kind]
        assert part["documents"] == count == 6
        documents = [
            document for shard in part["shards"] for document in read_documents(tmp_path / folder / shard["name"])
        ]
        expected = make_documents(1, folder.split("/")[0], kind, range(6))
        assert [p.nodes for p in documents] == [p.nodes for p in expected]
    label = read_document(tmp_path / "heldout/scene_pairs/scene_pairs-000000.tar", 0)
    assert label.nodes == [Image((0,)), Text(label.meta["caption"])]
    assert {"question", "answer"} <= set(label.meta)


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    for processes in (1, 2):
        prepare(tmp_path / str(processes), train={"binding": 600}, heldout={}, processes=processes)
    digests = [
        [shard["sha256"] for shard in read_manifest(tmp_path / n / "train/binding")["parts"]["binding"]["shards"]]
        for n in "12"
    ]
    assert digests[0] == digests[1]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    add_arguments(parser)
    out = str(tmp_path / "toy")
    run(parser.parse_args(["--out", out, "--scale", "0.0001", "--processes", "1", "--kinds", "captions"]))
    assert capsys.readouterr().out.count("documents") == 2
    with pytest.raises(UserError, match="must be positive"):
        prepare(tmp_path, scale=0)
    with pytest.raises(UserError, match="seed=-1"):
        prepare(tmp_path, seed=-1)
