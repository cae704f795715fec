"""MMC4 and open_flamingo's shards in: what is kept, what is dropped and why."""

from __future__ import annotations

import base64
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources import bad_images, flat, jpeg, jsonl, mmc4_document, prepare, refusal
from tests.data.test_index import make_tar


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return folder


def test_images_stand_before_their_own_sentence(tmp_path: Path, images: Path) -> None:
    readme = mmc4_document(
        ["A.", " B. ", "C."], ("0.jpg", 2, 0.3), ("1.jpg", 1, 0.3)
    )  # MMC4's README lists them like this
    shared = mmc4_document(["A.", "B."], ("2.jpg", 1, 0.3), ("0.jpg", 0, 0.25), ("3.jpg", 1, 0.24))
    done = prepare(
        tmp_path / "out", "mmc4", jsonl(tmp_path / "docs_shard_7_v3.jsonl", readme, shared), "--images", images
    )
    assert [flat(document) for document in done.documents] == [
        ["A.", jpeg(1), "B.", jpeg(0), "C."],
        [jpeg(0), "A.", jpeg(2), jpeg(3), "B."],
    ]
    assert [document.meta for document in done.documents] == [
        {"url": "http://x", "sentences": [1, 2]},
        {"url": "http://x", "sentences": [0, 1, 1]},
    ]
    assert "2 of 2 documents kept with 5 images, in 1 shards" in done.report


def test_zip_and_shard_folders_and_the_solved_assignment(tmp_path: Path, images: Path) -> None:
    unsolved = mmc4_document(["A.", "B."], ("0.jpg", 0, 0.3), ("1.jpg", 0, 0.3))
    for info in unsolved["image_info"]:
        del info["matched_text_index"], info["matched_sim"]
    unsolved["similarity_matrix"] = [[0.33, 0.32], [0.34, 0.1]]  # both like A. best; one to one is better together
    crowded = mmc4_document(["A."], ("0.jpg", 0, 0.3), ("1.jpg", 0, 0.3), ("2.jpg", 0, 0.3))
    for info in crowded["image_info"]:
        del info["matched_text_index"]
    (tmp_path / "docs").mkdir()
    with zipfile.ZipFile(tmp_path / "docs" / "docs_no_face_shard_12_v2.jsonl.zip", "w") as archive:
        archive.writestr("docs_no_face_shard_12_v2.jsonl", f"{json.dumps(unsolved)}\n{json.dumps(crowded)}\n")
    (tmp_path / "by_shard").mkdir()
    images.rename(tmp_path / "by_shard" / "12")
    done = prepare(tmp_path / "out", "mmc4", tmp_path / "docs", "--images", tmp_path / "by_shard")
    assert [flat(document) for document in done.documents] == [
        [jpeg(1), "A.", jpeg(0), "B."],
        [jpeg(0), jpeg(1), jpeg(2), "A."],
    ]


def test_what_is_dropped_is_counted_by_reason(tmp_path: Path, images: Path) -> None:
    bad = bad_images()
    for number, body in enumerate(bad.values()):
        (images / f"bad{number}.jpg").write_bytes(body)
    (images / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "secret.jpg").write_bytes(jpeg(9))
    outside = ("out.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"))
    listed = [("0.jpg", 0, 0.3), *((f"bad{n}.jpg", 0, 0.3) for n in range(len(bad)))]
    listed += [
        *((name, 0, 0.3) for name in outside),
        ("none.jpg", 0, 0.3),
        ("1.jpg", 0, 0.1),
        ("1.jpg", 0, float("nan")),
    ]
    no_name = mmc4_document(["A."], ("0.jpg", 0, 0.3))
    no_name["image_info"][0]["image_name"] = 5
    rows: list[object] = [
        mmc4_document(["A."], *listed),
        no_name,
        mmc4_document(["A."]),
        mmc4_document([" "], ("0.jpg", 0, 0.3)),
        mmc4_document(["A."], ("0.jpg", 1, 0.3)),
        mmc4_document(["A."], ("0.jpg", 0, 0.3), text_list="A."),
        mmc4_document(["A."], ("0.jpg", 0, 0.3), text_list=[1]),
        mmc4_document(["A."], ("0.jpg", 0, 0.3), image_info=[3]),
        mmc4_document(["A."], ("0.jpg", 0, 0.3), could_have_url_duplicate=1),
        [1],
        b"{",
        b"\xff",
    ]
    done = prepare(
        tmp_path / "out", "mmc4", jsonl(tmp_path / "x.jsonl", *rows), "--images", images, "--drop-url-duplicates"
    )
    assert [flat(document) for document in done.documents] == [[jpeg(0), "A."]]
    assert done.dropped_images == dict.fromkeys(bad, 1) | {
        "image is a link out of its folder": 1,
        "image's name leads out of its folder": 2,
        "image is missing": 1,
        "similarity below 0.24": 2,
        "image has no 'image_name'": 1,
    }
    assert done.dropped == {
        "fewer than 1 images left": 2,
        "no text": 1,
        "'matched_text_index' is outside the sentences": 1,
        "'text_list' is not a list of sentences": 2,
        "'image_info' is not a list of objects": 1,
        "url may be a duplicate": 1,
        "line is not a JSON object": 1,
        "line is not JSON": 2,
    }
    assert "2  line is not JSON  (first: x.jsonl byte" in done.report


def test_images_are_judged_by_their_header(tmp_path: Path, images: Path) -> None:
    (images / "long.jpg").write_bytes(jpeg(1, (90, 30)))
    (images / "small.jpg").write_bytes(jpeg(1, (20, 30)))
    cut = jpeg(1, (64, 64))[:-200]
    (images / "cut.jpg").write_bytes(cut)
    names = ("0.jpg", "long.jpg", "small.jpg", "cut.jpg")
    path = jsonl(tmp_path / "x.jsonl", mmc4_document(["A."], *((name, 0, 0.3) for name in names)))
    some = ("--min-side", 25, "--max-aspect", 2)
    done = prepare(tmp_path / "a", "mmc4", path, "--images", images, *some, faults=1)
    assert flat(done.documents[0]) == [jpeg(0), cut, "A."]
    done = prepare(tmp_path / "b", "mmc4", path, "--images", images, "--decode", *some)
    assert flat(done.documents[0]) == [jpeg(0), "A."]
    assert done.dropped_images == {
        "image longer than 2 times its width": 1,
        "image with a side below 25 pixels": 1,
        "image cannot be decoded": 1,
    }


def test_half_surrogates_and_names_that_cannot_be_printed(tmp_path: Path, images: Path) -> None:
    odd = mmc4_document(["A \ud83d cat."], ("0.jpg", 0, 0.3), url="http://x/\udcff")
    lost = mmc4_document(["B."], ("\ud83d.jpg", 0, 0.3))
    long = mmc4_document(["B."], ("x" * 5000, 0, 0.3))
    done = prepare(tmp_path / "out", "mmc4", jsonl(tmp_path / "x\udcff.jsonl", odd, lost, long), "--images", images)
    assert [flat(document) for document in done.documents] == [[jpeg(0), "A ? cat."]]
    assert done.dropped_images == {"image is missing": 2}
    assert "(first: x?.jsonl byte" in done.report


def test_mistakes(tmp_path: Path, images: Path) -> None:
    path, out = jsonl(tmp_path / "x.jsonl", mmc4_document(["A."], ("0.jpg", 0, 0.3))), tmp_path / "out"
    assert "not multiplied by 100" in refusal(out, "mmc4", path, "--images", images, "--min-similarity", 24)
    assert "image folder" in refusal(out, "mmc4", path, "--images", tmp_path / "none")
    assert "none.jsonl does not exist" in refusal(out, "mmc4", tmp_path / "none.jsonl", "--images", images)
    assert "holds no .jsonl or" in refusal(out, "mmc4", images, "--images", images)
    told = refusal(out, "mmc4", path, "--images", images, "--min-similarity", 0.9)
    assert "not one document was kept" in told
    assert "1 similarity below 0.9" in told
    pointer = tmp_path / "p.jsonl"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "p.jsonl is a Git-LFS pointer" in refusal(tmp_path / "o", "mmc4", pointer, "--images", images)
    broken = tmp_path / "b.jsonl.zip"
    with zipfile.ZipFile(broken, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b.jsonl", json.dumps(mmc4_document(["A."], ("0.jpg", 0, 0.3))) * 50)
    broken.write_bytes(broken.read_bytes()[:-30])
    assert "b.jsonl.zip is damaged or incomplete" in refusal(tmp_path / "o", "mmc4", broken, "--images", images)


def open_flamingo_shard(path: Path, *bodies: object, key: str = "4f") -> Path:
    members = [
        (f"{key}{n:02d}.json", b if isinstance(b, bytes) else json.dumps(b).encode()) for n, b in enumerate(bodies)
    ]
    return make_tar(path, members)


def with_base64(body: dict[str, Any], *images: bytes | None) -> dict[str, Any]:
    for info, image in zip(body["image_info"], images, strict=True):
        if image is not None:
            info["image_base64"] = base64.b64encode(image).decode()
    return body


def test_open_flamingos_shards(tmp_path: Path) -> None:
    document = with_base64(
        mmc4_document(["A.", "B."], ("0.jpg", 1, 0.3), ("1.jpg", 0, 0.3), ("2.jpg", 0, 0.3)), jpeg(0), jpeg(1), None
    )
    accident = with_base64(mmc4_document(["A."], ("0.jpg", 0, 0.3)), jpeg(2))
    accident["image_info"][0]["image_base64"] = str(base64.b64encode(jpeg(2)))  # "b'...'"
    generated = {
        "is_gpt": True,
        "example": "_!_IMAGE1_!_ A cat. _!_IMAGE2_!_A dog. _!_IMAGE3_!_ None.",
        "image_map": {
            "_!_IMAGE1_!_": {"base64_image": base64.urlsafe_b64encode(jpeg(3)).decode()},
            "_!_IMAGE2_!_": {"base64_image": base64.b64encode(jpeg(4)).decode()},
        },
    }
    wrong = with_base64(mmc4_document(["A."], ("0.jpg", 0, 0.3)), jpeg(0))
    wrong["image_info"][0]["image_base64"] = "???"
    empty = {"is_gpt": 1, "example": "x", "image_map": {}}
    shard = open_flamingo_shard(
        tmp_path / "000000000.tar", document, accident, generated, wrong, empty, {"is_gpt": 1}, b"{", b"[]"
    )
    done = prepare(tmp_path / "out", "openflamingo", shard)
    assert [flat(document) for document in done.documents] == [
        [jpeg(1), "A.", jpeg(0), "B."],
        [jpeg(2), "A."],
        [jpeg(3), "A cat.", jpeg(4), "A dog. None."],
    ]
    assert done.dropped == {
        "fewer than 1 images left": 2,
        "'example' is not text or 'image_map' not an object": 1,
        "JSON cannot be read": 1,
        "JSON is not an object": 1,
    }
    assert done.dropped_images == {"image is missing": 2, "image's base64 cannot be read": 1}


def test_a_truncated_tar_stops_or_is_counted(tmp_path: Path) -> None:
    good = with_base64(mmc4_document(["A."], ("0.jpg", 0, 0.3)), jpeg(0))
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        open_flamingo_shard(tmp_path / "in" / f"{name}.tar", good, good)
    cut = tmp_path / "in" / "a.tar"
    cut.write_bytes(cut.read_bytes()[:2500])
    assert "a.tar is truncated" in refusal(tmp_path / "out", "openflamingo", tmp_path / "in")
    done = prepare(tmp_path / "out", "openflamingo", tmp_path / "in", "--skip-bad-files")  # goes on where it stopped
    assert len(done.documents) == 2
    assert done.dropped == {"whole file damaged": 1}
    assert "(first: a.tar)" in done.report


def test_the_manifest_tells_the_options_and_no_paths(tmp_path: Path, images: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", mmc4_document(["A."], ("0.jpg", 0, 0.3)))
    done = prepare(tmp_path / "out", "mmc4", path, "--images", images, "--min-side", 5)
    assert done.meta["options"]["min_side"] == 5
    assert str(tmp_path) not in json.dumps(done.meta)
