"""Data sets of images."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from tests.eval.published.files import COUNT, TINTS, dump, dump_lines, image, ten
from tests.fixtures import png


def karpathy(root: Path, name: str, where: str) -> None:
    images = []
    for number in range(2 * COUNT):
        split = "test" if number < COUNT else "train"
        folder = "val2014" if number < COUNT else "train2014"
        row = {"split": split, "filename": f"{number}.jpg", "imgid": number, "sentids": [number]}
        row["sentences"] = [{"raw": f"a thing number {number}", "tokens": ["a"], "sentid": number}] * 5
        if name == "coco":
            row |= {"filepath": folder, "cocoid": 100 + number}
        images.append(row)
        image(root / (folder if name == "coco" else where) / f"{number}.jpg", number)
    dump(root / f"dataset_{name}.json", {"images": images, "dataset": name})


def coco(root: Path) -> None:
    karpathy(root, "coco", "")
    (root / "val2014").mkdir(exist_ok=True)


def flickr30k(root: Path) -> None:
    karpathy(root, "flickr30k", "flickr30k-images")


def nocaps(root: Path) -> None:
    karpathy(root, "coco", "")
    images = [{"id": n, "file_name": f"{n}.jpg", "domain": "near-domain", "coco_url": "x"} for n in range(COUNT)]
    notes = [{"image_id": n % COUNT, "id": n, "caption": f"caption {n}"} for n in range(10 * COUNT)]
    dump(root / "nocaps_val_4500_captions.json", {"info": {}, "images": images, "annotations": notes})
    for number in range(COUNT):
        image(root / "nocaps_val" / f"{number}.jpg", 50 + number)


def textcaps(root: Path) -> None:
    for split, start in (("val", 0), ("train", COUNT)):
        rows = []
        for number in range(start, start + COUNT):
            refs = [f"a sign {number} {n}" for n in range(5)]
            rows += [{"image_id": f"im{number}", "caption_str": r, "reference_strs": refs} for r in refs]
            image(root / "train_images" / f"im{number}.jpg", number)
        dump(root / f"TextCaps_0.1_{split}.json", {"dataset_name": "textcaps", "data": rows})


def vqa_form(root: Path, questions: str, annotations: str, raw: bool) -> None:
    for split, start in (("val", 0), ("train", COUNT)):
        asked, answered = [], []
        for number in range(start, start + COUNT):
            asked.append({"image_id": number, "question": "What  colour?", "question_id": 10 * number})
            answers = ten("red")
            answers = [{**a, "raw_answer": "reds" if a["answer"] == "red" else "others"} for a in answers]
            answers = answers if raw else ten("red")
            row = {"question_type": "what", "multiple_choice_answer": "red", "answers": answers, "image_id": number}
            answered.append(row | {"answer_type": "other", "question_id": 10 * number})
            image(root / f"{split}2014/COCO_{split}2014_{number:012d}.jpg", number)
        dump(root / questions.format(split), {"info": {}, "questions": asked})
        dump(root / annotations.format(split), {"annotations": answered})


def vqav2(root: Path) -> None:
    vqa_form(root, "v2_OpenEnded_mscoco_{}2014_questions.json", "v2_mscoco_{}2014_annotations.json", raw=False)


def okvqa(root: Path) -> None:
    vqa_form(root, "OpenEnded_mscoco_{}2014_questions.json", "mscoco_{}2014_annotations.json", raw=True)


def textvqa(root: Path) -> None:
    for split, start in (("val", 0), ("train", COUNT)):
        rows = [
            {"question": "what is written?", "image_id": f"t{n}", "answers": ["stop"] * 9 + ["go"], "question_id": n}
            for n in range(start, start + COUNT)
        ]
        dump(root / f"TextVQA_0.5.1_{split}.json", {"dataset_type": split, "data": rows})
        for number in range(start, start + COUNT):
            image(root / "train_images" / f"t{number}.jpg", number)


def vizwiz(root: Path) -> None:
    for split, start in (("val", 0), ("train", COUNT)):
        rows = []
        for number in range(start, start + COUNT):
            answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 6 + [{"answer": "can"}] * 4
            name = f"VizWiz_{split}_{number:08d}.jpg"
            rows.append({"image": name, "question": "What is\n this? ", "answers": answers, "answer_type": "other"})
            image(root / split / name, number)
        dump(root / f"{split}.json", rows)


def hateful_memes(root: Path) -> None:
    for name, start in (("dev_seen", 0), ("train", COUNT)):
        numbers = range(start, start + COUNT)
        dump_lines(
            root / f"{name}.jsonl",
            [{"id": n, "img": f"img/{n:05d}.png", "label": n % 2, "text": "look  at {this}"} for n in numbers],
        )
        for number in numbers:
            image(root / f"img/{number:05d}.png", number)


def imagenet(root: Path) -> None:
    names = "n01440764 tench, Tinca tinca\nn02012849 crane, bird\nn03126707 crane\n"
    root.mkdir(parents=True, exist_ok=True)
    (root / "LOC_synset_mapping.txt").write_text(names)
    for split in ("val", "train"):
        for place, folder in enumerate(("n01440764", "n02012849", "n03126707")):
            for number in range(2):
                image(root / split / folder / f"ILSVRC_{split}_{number}.JPEG", 10 * place + number)


def scienceqa(root: Path) -> None:
    problems: dict[str, Any] = {}
    for number in range(2 * COUNT):
        split = "test" if number < COUNT else "train"
        row = {"question": "Which?", "choices": ["north", "south", "west"][: 2 + number % 2], "answer": number % 2}
        row |= {"hint": "A map." if number % 2 else "", "image": "image.png" if number % 3 else None, "split": split}
        row |= {"grade": f"grade{number + 2}", "subject": "social science", "lecture": "Maps\nshow.", "solution": "So."}
        problems[str(number)] = row
        if number % 3:
            image(root / "images" / split / str(number) / "image.png", number)
    dump(root / "problems.json", problems)
    splits = {"test": [str(n) for n in range(COUNT)], "train": [str(n) for n in range(COUNT, 2 * COUNT)]}
    dump(root / "pid_splits.json", splits)


def medical_rows(start: int, **names: str) -> list[dict[str, Any]]:
    rows = []
    for number in range(start, start + COUNT):
        row: dict[str, Any] = {"qid": number, "question": "Is it normal?", "answer": "No", "answer_type": "CLOSED "}
        if number % 2:
            row |= {"question": "How many?", "answer": 4, "answer_type": "OPEN"}
        rows.append(row | {key: value.format(number) for key, value in names.items()})
    return rows


def vqa_rad(root: Path) -> None:
    for name, start in (("testset", 0), ("trainset", COUNT)):
        dump(root / f"{name}.json", medical_rows(start, image_name="synpic{}.jpg", phrase_type="freeform"))
        for number in range(start, start + COUNT):
            image(root / "images" / f"synpic{number}.jpg", number)


def slake(root: Path) -> None:
    for name, start in (("test", 0), ("train", COUNT)):
        rows = [{**row, "q_lang": "en"} for row in medical_rows(start, img_name="xmlab{}/source.jpg")]
        dump(root / f"{name}.json", [*rows, {**rows[0], "q_lang": "zh", "qid": 999}])
        for number in range(start, start + COUNT):
            image(root / "imgs" / f"xmlab{number}/source.jpg", number)


def pathvqa(root: Path) -> None:
    for split in ("test", "train"):
        rows = [
            {"image": f"{split}_{n:04d}", "question": "is it?", "answer": "yes" if n % 2 else "liver"}
            for n in range(COUNT)
        ]
        (root / "qas" / split).mkdir(parents=True)
        (root / "qas" / split / f"{split}_qa.pkl").write_bytes(pickle.dumps(rows))
        for number in range(COUNT):
            image(root / "images" / split / f"{split}_{number:04d}.jpg", number + (100 if split == "train" else 0))


def mmmu(root: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for split, start in (("validation", 0), ("dev", COUNT)):
        rows = []
        for number in range(start, start + COUNT):
            images = [{"bytes": png(TINTS[number % 4], number + 50 * n), "path": f"{number}.png"} for n in range(3)]
            row: dict[str, Any] = {
                "id": f"{split}_Accounting_{number}",
                "question": "<image 1> What is it?",
                "image_1": images[0],
            }
            row |= {"options": "['$6', \"it's 7\"]", "answer": "B", "question_type": "multiple-choice"}
            row["image_2"] = row["image_3"] = None
            if number % COUNT == 1:  # of three images, one of which is an option
                row |= {"question": "Is <image 1> left of <image 2>?", "options": "['no', '<image 3>', 'as <image 2>']"}
                row |= {"image_2": images[1], "image_3": images[2]}
            if number % COUNT == 3:
                row |= {"options": "[]", "answer": "['1,250.50', 'a lot']", "question_type": "open"}
            rows.append(row)
        (root / "Accounting").mkdir(parents=True, exist_ok=True)
        file = root / "Accounting" / f"{split}-00000-of-00001.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
