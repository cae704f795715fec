"""Data sets of videos, of words alone, and Winoground."""

from __future__ import annotations

from pathlib import Path

from tests.eval.published.files import COUNT, clip, dump, dump_csv, dump_lines, image


def winoground(root: Path) -> None:
    rows = []
    for number in range(COUNT):
        captions = {"caption_0": "a dog on a cat", "caption_1": "a cat on a dog", "collapsed_tag": "Object"}
        rows.append({"id": number, "image_0": f"ex_{number}_img_0", "image_1": f"ex_{number}_img_1", **captions})
        for which in (0, 1):
            image(root / "images" / f"ex_{number}_img_{which}.png", 2 * number + which)
    dump_lines(root / "examples.jsonl", rows)


def video_qa(root: Path, prefix: str) -> None:
    for split, start in (("test", 0), ("train", COUNT)):
        numbers = range(start, start + COUNT)
        rows = [{"answer": "man", "id": n, "question": "who is singing?", "video_id": n} for n in numbers]
        dump(root / f"{split}_qa.json", rows)
        for number in numbers:
            clip(root / "videos" / f"{prefix}{number}", number)


def msvd_qa(root: Path) -> None:
    video_qa(root, "")


def msrvtt_qa(root: Path) -> None:
    video_qa(root, "video")


def ivqa(root: Path) -> None:
    for split, start in (("test", 0), ("train", COUNT)):
        rows = []
        for number in range(start, start + COUNT):
            answers = {f"answer{n + 1}": word for n, word in enumerate(["spoon", "spoon", "fork", "cup", "pan"])}
            rows.append({"video_id": f"v{number}", "start": 1, "end": 9.5, "question": "what?", **answers})
            clip(root / "videos" / f"v{number}", number)
        (root).mkdir(exist_ok=True)
        dump_csv(root / f"{split}.csv", rows)


def vatex(root: Path) -> None:
    for name, start in (("vatex_public_test_english_v1.1", 0), ("vatex_training_v1.0", COUNT)):
        numbers = range(start, start + COUNT)
        dump(root / f"{name}.json", [{"videoID": f"a_{n}_000001_000011", "enCap": [f"cap {n}"] * 10} for n in numbers])
        for number in numbers:
            clip(root / "videos" / f"a_{number}_000001_000011", number)


def nextqa(root: Path) -> None:
    for split, start in (("test", 0), ("train", COUNT)):
        rows = []
        for number in range(start, start + COUNT):
            row = {
                "video": f"{number}",
                "frame_count": 9,
                "width": 8,
                "height": 8,
                "question": "why run",
                "answer": "fun",
            }
            rows.append(row | {"qid": 3, "type": "TP"})
            clip(root / "videos" / str(number), number)
        dump_csv(root / f"{split}.csv", rows)
    dump(root / "add_reference_answer_test.json", {"0": {"3": "joy"}})


def nextqa_choice(root: Path) -> None:
    for split, start in (("val", 0), ("train", COUNT)):
        rows = []
        for number in range(start, start + COUNT):
            row = {"video": number, "question": "why", "answer": 2, "qid": 1, "type": "CW"}
            rows.append(row | {f"a{n}": f"reason {n}" for n in range(5)})
            clip(root / "videos" / str(number), number)
        dump_csv(root / f"{split}.csv", rows)


def star(root: Path) -> None:
    for split, start in (("val", 0), ("train", COUNT)):
        rows = []
        for number in range(start, start + COUNT):
            choices = [{"choice_id": n, "choice": f"The bag {n}.", "choice_program": []} for n in range(4)]
            row = {"question_id": f"Interaction_T1_{number}", "question": "Which?", "answer": "The bag 1."}
            rows.append(row | {"choices": choices, "video_id": f"S{number}", "start": 1.5, "end": 7.0})
            clip(root / "videos" / f"S{number}", number)
        dump(root / f"STAR_{split}.json", rows)


def youcook2(root: Path) -> None:
    database = {}
    for number in range(2 * COUNT):
        subset = "validation" if number < COUNT else "training"
        parts = [{"id": 0, "segment": [1, 5], "sentence": f"cut {number}\n onions"}]
        database[f"y{number}"] = {"subset": subset, "duration": 9.0, "annotations": parts}
        clip(root / "videos" / f"y{number}", number)
    dump(root / "youcookii_annotations_trainval.json", {"database": database})


def rareact(root: Path) -> None:
    rows = []
    for number in range(COUNT):
        action = dict(zip(("verb", "noun"), [("cut", "phone"), ("wash", "phone")][number % 2], strict=True))
        row = {"id": number, "video_id": f"r{number // 2}", "start": 0, "end": 9, "class_id": number % 2, **action}
        rows.append(row | {"annotation": [1, 1, 0, 2, 1, 0][number]})
        clip(root / "videos" / f"r{number // 2}", number // 2)
    dump_csv(root / "rareact.csv", rows)


def medqa(root: Path) -> None:
    for split in ("test", "train"):
        options = {"A": "aspirin", "B": "rest", "C": "surgery", "D": "none"}
        row = {"question": f"Which, {split}?", "answer": "rest", "options": options, "meta_info": "step1"}
        dump_lines(root / f"phrases_no_exclude_{split}.jsonl", [row | {"answer_idx": "B"}] * COUNT)


def medmcqa(root: Path) -> None:
    for split in ("dev", "train"):
        asked = {"dev": "Which?", "train": "And which?"}[split]  # the same question would be refused as a leak
        row = {"question": asked, "opa": "a1", "opb": "b1", "opc": "c1", "opd": "d1", "cop": 3, "exp": "Because."}
        dump_lines(
            root / f"{split}.json", [row | {"id": f"{split}{n}", "subject_name": "Anatomy"} for n in range(COUNT)]
        )


def pubmedqa(root: Path) -> None:
    shared = {"CONTEXTS": ["We", "saw."], "final_decision": "maybe"}
    rows = {str(n): {"QUESTION": "Does it?" if n < COUNT else "Does that?"} | shared for n in range(12)}
    dump(root / "ori_pqal.json", rows)
    dump(root / "test_ground_truth.json", {str(n): "maybe" for n in range(COUNT)})


def mmlu_medicine(root: Path) -> None:
    for split in ("test", "dev"):
        (root / split).mkdir(parents=True)
        for subject in ("anatomy", "astronomy"):
            verb = {"test": "is", "dev": "was"}[split]
            rows = f'"Which {subject}, {verb} it?",one,two,three,"four, or five",D\n' * COUNT
            (root / split / f"{subject}_{split}.csv").write_text(rows)
