"""Scoring folders, parquet, jsonl and run samples; the cache."""

import io
import json
from dataclasses import dataclass, field

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from diffalign.cli import main
from diffalign.errors import UserError
from diffalign.rewards.scoring.cache import ScoreCache, reward_key
from diffalign.rewards.scoring.items import read_items
from diffalign.rewards.scoring.score import Scorer, make_scorers, score, write_table
from tests.helpers import PUBLISHED_DATA
from tests.rewards.conftest import write_jsonl


@dataclass
class Brightness:
    """Mean grey level plus the prompt's length, and how many images it was asked for."""

    asked: list = field(default_factory=list)

    def __call__(self, images, prompts):
        self.asked.append(len(images))
        values = [float(np.asarray(i).mean()) + len(p) for i, p in zip(images, prompts, strict=True)]
        return torch.tensor(values)


def plain(level: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (level, level, level))


def encoded(level: int) -> bytes:
    buffer = io.BytesIO()
    plain(level).save(buffer, "PNG")
    return buffer.getvalue()


def run(items, scorer=None, cache=None):
    return score(items, [scorer or Scorer("light", Brightness())], cache, progress=False)


def test_a_folder_with_captions(tmp_path):
    for level in (10, 20):
        plain(level).save(tmp_path / f"{level}.png")
        (tmp_path / f"{level}.txt").write_text("abc\n")
    rows = run(read_items(tmp_path)).rows
    assert [row["light"] for row in rows] == [13, 23]
    assert rows[0] == {"file": str(tmp_path / "10.png"), "prompt": "abc", "light": 13}


def test_a_folder_with_given_prompts(tmp_path):
    for level in (10, 20):
        plain(level).save(tmp_path / f"{level}.png")
    assert [r["light"] for r in run(read_items(tmp_path, ["a", "bb"])).rows] == [11, 22]
    assert [r["light"] for r in run(read_items(tmp_path, ["a"])).rows] == [11, 21]
    with pytest.raises(UserError, match="3 prompts for the 2 images"):
        list(read_items(tmp_path, ["a", "b", "c"]))
    with pytest.raises(UserError, match=r"10.txt is missing"):
        list(read_items(tmp_path))


def test_sampled_folders_and_run_directories(tmp_path):
    folder = tmp_path / "samples" / "step-000010"
    folder.mkdir(parents=True)
    plain(5).save(folder / "a.png")
    rows = [{"file": "b.png", "prompt": "not drawn"}, {"file": "a.png", "prompt": "xy"}]
    write_jsonl(folder / "manifest.jsonl", rows)
    assert [r["light"] for r in run(read_items(folder)).rows] == [7]
    assert [r["light"] for r in run(read_items(tmp_path)).rows] == [7]


def test_parquet_scores_both_columns_in_one_row(tmp_path):
    table = {"caption": ["a", "bbb"], "jpg_0": [encoded(1), encoded(2)], "jpg_1": [encoded(3), b"broken"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "pairs.parquet")
    result = run(read_items(tmp_path / "pairs.parquet"))
    assert [(r["row"], r["prompt"], r["light_0"], r.get("light_1")) for r in result.rows] == [
        (0, "a", 2, 4),
        (1, "bbb", 5, None),
    ]
    assert len(result.unreadable) == 1 and "pairs.parquet row 1 image_1" in result.unreadable[0]


def test_jsonl_of_images_and_of_pairs(tmp_path):
    for level in (1, 2):
        plain(level).save(tmp_path / f"{level}.png")
    rows = [{"prompt": "a", "image": "1.png"}, {"prompt": "b", "chosen": "2.png", "rejected": "1.png"}]
    result = run(read_items(write_jsonl(tmp_path / "x.jsonl", rows))).rows
    assert result[0]["light"] == 2
    assert (result[1]["light_chosen"], result[1]["light_rejected"]) == (3, 2)


def test_lists_and_other_names_of_columns(tmp_path):
    """What ``train`` reads can be scored: bytes, datasets' mappings, paths."""
    for level in (1, 2):
        plain(level).save(tmp_path / f"{level}.png")
    rows = [
        {"prompt": "a", "images": ["1.png", "2.png"], "scores": [1, 0]},
        {"caption": "bb", "jpg_0": "2.png", "jpg_1": "1.png"},
        {"prompt": "c", "path1": "1.png", "path2": "2.png"},
    ]
    found = run(read_items(write_jsonl(tmp_path / "x.jsonl", rows))).rows
    assert [{n: v for n, v in row.items() if n.startswith("light")} for row in found] == [
        {"light_0": 2, "light_1": 3},
        {"light_0": 4, "light_1": 3},
        {"light_path1": 2, "light_path2": 3},
    ]
    lists = {"prompt": ["a", "b"], "images": [[encoded(5), encoded(6)], [encoded(7)]]}
    parquet.write_table(pyarrow.table(lists), tmp_path / "lists.parquet")
    found = run(read_items(tmp_path / "lists.parquet")).rows
    assert [(row["light_0"], row.get("light_1")) for row in found] == [(6, 7), (8, None)]
    cells = [{"bytes": encoded(5), "path": None}, {"bytes": None, "path": "2.png"}, None]
    parquet.write_table(pyarrow.table({"caption": ["a"] * 3, "image": cells}), tmp_path / "one.parquet")
    result = run(read_items(tmp_path / "one.parquet"))
    assert [row["light"] for row in result.rows] == [6, 3]
    assert len(result.unreadable) == 1 and "one.parquet row 2" in result.unreadable[0]


def test_broken_files_of_every_kind_are_skipped(tmp_path):
    whole = encoded(9)
    header = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + b"\xff" * 8  # of an absurd size, and cut off
    files = {"whole": whole, "cut": whole[:45], "empty": b"", "text": b"no image", "header": header}
    files["bomb"] = whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:]
    for name, data in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    result = run(read_items(tmp_path, ["a"]))
    assert [row["file"] for row in result.rows] == [str(tmp_path / "whole.png")]
    assert len(result.unreadable) == 5 and all(f"{tmp_path}" in place for place in result.unreadable)


def test_animations_are_counted_once(tmp_path, caplog):
    for name in ("a.gif", "b.gif"):
        plain(10).save(tmp_path / name, save_all=True, append_images=[plain(200)])
        (tmp_path / name).with_suffix(".txt").write_text("abc")
    plain(10).save(tmp_path / "c.png")
    (tmp_path / "c.txt").write_text("abc")
    rows = run(read_items(tmp_path)).rows
    assert [row["light"] for row in rows] == [13, 13, 13]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("2 image files have several frames") and "a.gif" in told


def test_images_are_seen_as_they_are_displayed(tmp_path):
    """Turned as EXIF says, and what is transparent is white: as training sees them."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    seen = []

    def reward(images, prompts):
        seen.extend((image.size, image.getpixel((0, 0))) for image in images)
        return torch.zeros(len(images))

    run(read_items(tmp_path, ["a"]), Scorer("seen", reward))
    assert seen == [((4, 4), (255, 255, 255)), ((4, 8), (0, 0, 0))]


def test_an_interruption_loses_nothing_that_was_scored(tmp_path):
    for level in range(10):
        plain(level).save(tmp_path / f"{level}.png")
    cache, light = ScoreCache(tmp_path / "scores.sqlite"), Brightness()

    def stopped(images, prompts):
        if len(light.asked) == 2:
            raise KeyboardInterrupt
        return light(images, prompts)

    with pytest.raises(KeyboardInterrupt):
        run(read_items(tmp_path, ["a"]), Scorer("light", stopped, "key", 3), cache)
    assert light.asked == [3, 3]  # three at a time, and kept
    rows = run(read_items(tmp_path, ["a"]), Scorer("light", light, "key", 3), cache).rows
    assert [row["light"] for row in rows] == [level + 1 for level in range(10)]
    assert light.asked == [3, 3, 3, 1]


def test_the_interrupted_command_says_where_its_scores_are(tmp_path, monkeypatch, capsys):
    folder, output = tmp_path / "images", tmp_path / "scores.jsonl"
    folder.mkdir()
    for level in range(5):
        plain(level).save(folder / f"{level}.png")
    (tmp_path / "p.txt").write_text("a\n")
    light = Brightness()

    def stopped(images, prompts):
        if light.asked:
            raise KeyboardInterrupt
        return light(images, prompts)

    argv = ["score", str(folder), "--rewards", "tiny_clip", "--prompts", str(tmp_path / "p.txt")]
    argv += ["--batch-size", "2", "--output", str(output)]
    monkeypatch.setattr("diffalign.rewards.scoring.score.load", lambda *_: stopped)
    assert main(argv) == 130 and not output.exists()
    assert f"{tmp_path / 'score-cache.sqlite'}; the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr("diffalign.rewards.scoring.score.load", lambda *_: light)
    assert main(argv) == 0
    assert light.asked == [2, 2, 1]
    assert [json.loads(line)["tiny_clip"] for line in output.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_score_that_is_no_number_is_named_and_not_kept(tmp_path):
    plain(1).save(tmp_path / "1.png")
    cache = ScoreCache(tmp_path / "scores.sqlite")
    with pytest.raises(UserError, match=r"1.png: reward 'bad' gives nan"):
        run(
            read_items(tmp_path, ["a"]),
            Scorer("bad", lambda images, _: torch.full((len(images),), torch.nan), "key"),
            cache,
        )
    assert run(read_items(tmp_path, ["a"]), Scorer("bad", Brightness(), "key"), cache).rows[0]["bad"] == 2


def test_what_a_reward_refuses_is_named_with_its_place(tmp_path):
    for name in ("1.png", "2.png"):
        plain(1).save(tmp_path / name)

    def picky(images, prompts):
        raise UserError(f"reward 'picky': {prompts[0]!r} is no prompt")

    for prompts, place in ((["a"], "1.png to .*2.png"), (["a", "b"], "1.png")):
        items = list(read_items(tmp_path, prompts))[: len(prompts) % 2 + 1]
        with pytest.raises(UserError, match=f"^.*{place}: reward 'picky': 'a' is no prompt"):
            run(items, Scorer("picky", picky))


def test_a_reward_of_videos_is_not_loaded_for_images(tmp_path, capsys, monkeypatch):
    plain(1).save(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("a")
    monkeypatch.setattr("diffalign.rewards.scoring.score.load", lambda *_: pytest.fail("it was loaded"))
    assert main(["score", str(tmp_path), "--rewards", "video_reward"]) == 2
    assert "reward 'video_reward' judges videos, and these are images" in capsys.readouterr().err


def test_a_missing_image_is_named_and_skipped(tmp_path):
    plain(1).save(tmp_path / "1.png")
    rows = [{"prompt": "a", "image": "none.png"}, {"prompt": "a", "image": "1.png"}]
    result = run(read_items(write_jsonl(tmp_path / "x.jsonl", rows)))
    assert len(result.rows) == 1 and "x.jsonl row 1" in result.unreadable[0]


def test_the_cache_answers_the_second_time(tmp_path):
    for level in (10, 20, 30):
        plain(level).save(tmp_path / f"{level}.png")
    cache, light = ScoreCache(tmp_path / "cache" / "scores.sqlite"), Brightness()
    first = run(read_items(tmp_path, ["a"]), Scorer("light", light, "key"), cache).rows
    assert light.asked == [3]
    again = run(
        read_items(tmp_path, ["a"]),
        Scorer("light", light, "key"),
        ScoreCache(tmp_path / "cache" / "scores.sqlite"),
    )
    assert again.rows == first and light.asked == [3]
    run(read_items(tmp_path, ["b"]), Scorer("light", light, "key"), cache)  # another prompt
    run(read_items(tmp_path, ["a"]), Scorer("light", light, "other"), cache)  # another reward
    plain(11).save(tmp_path / "10.png")  # another image of the same name
    run(read_items(tmp_path, ["a"]), Scorer("light", light, "key"), cache)
    assert light.asked == [3, 3, 3, 1]


def test_equal_images_are_scored_once(tmp_path):
    for name in ("a", "b"):
        plain(10).save(tmp_path / f"{name}.png")
    light = Brightness()
    rows = run(read_items(tmp_path, ["x"]), Scorer("light", light, "key"), ScoreCache(tmp_path / "s")).rows
    assert [r["light"] for r in rows] == [11, 11] and light.asked == [1]


def test_the_identity_of_a_reward_follows_its_files(tmp_path):
    file = tmp_path / "head.pth"
    file.write_bytes(b"one")
    before = reward_key(f"aesthetic_v2:{file}")
    assert before == reward_key(f"aesthetic_v2:{file}") != reward_key("aesthetic_v2")
    file.write_bytes(b"other")
    assert reward_key(f"aesthetic_v2:{file}") != before


def test_a_reward_without_a_source_looks_at_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = reward_key("tiny_clip")
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "set.bin").write_bytes(b"x")
    monkeypatch.setattr("pathlib.Path.rglob", lambda *_: pytest.fail("walked through the folder"))
    assert reward_key("tiny_clip") == before


def test_cheap_rewards_are_not_cached(clip_folder):
    jpeg, clip = make_scorers(["jpeg", f"tiny_clip:{clip_folder}"])
    assert jpeg.name == "jpeg" and jpeg.key is None
    assert clip.name == "tiny_clip" and clip.key is not None
    with pytest.raises(UserError, match="twice"):
        make_scorers(["jpeg", "jpeg"])


def test_tables_round_trip(tmp_path):
    rows = [{"prompt": "a", "light_0": 1.5}, {"prompt": "b", "light_0": 2.0, "light_1": 3.0}]
    write_table(rows, tmp_path / "out" / "x.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out" / "x.jsonl").read_text().splitlines()] == rows
    write_table(rows, tmp_path / "x.parquet")
    assert parquet.read_table(tmp_path / "x.parquet").to_pylist() == [{**rows[0], "light_1": None}, rows[1]]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["x.jsonl"]
    with pytest.raises(UserError, match=r"x.csv"):
        write_table(rows, tmp_path / "x.csv")


def test_bad_inputs_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    (tmp_path / "x.csv").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "image": "x.png"}\n{oops\n')
    (tmp_path / "none.jsonl").write_text('{"image": "x.png"}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "a", "chosen": "x.png"}\n')
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "other.parquet")
    for name, words in {
        "absent": "no file or folder",
        "empty": "no images",
        "x.parquet": "not a readable parquet",
        "x.csv": "allowed: a folder",
        "bad.jsonl": "line 2: not JSON",
        "none.jsonl": "'prompt'",
        "half.jsonl": "line 1 has no image or video; it has prompt, chosen; needed",
        "other.parquet": "no column of images or videos; it has text",
    }.items():
        with pytest.raises(UserError, match=words):
            list(read_items(tmp_path / name))
    with pytest.raises(UserError, match="at least one reward"):
        score([], [])
    with pytest.raises(UserError, match="no images"):
        run([])
    (tmp_path / "empty" / "x.png").write_text("not an image")
    with pytest.raises(UserError, match="none of the 1 images"):
        run(read_items(tmp_path / "empty", ["a"]))
    (tmp_path / "cache").write_text("not a database, and long enough to be taken for one" * 50)
    with pytest.raises(UserError, match="not a score cache"):
        ScoreCache(tmp_path / "cache")


PICKAPIC = PUBLISHED_DATA / "pairs" / "pickapic.parquet"


def test_real_pick_a_pic_rows():
    rows = score(read_items(PICKAPIC), make_scorers(["jpeg"]), progress=False).rows
    assert len(rows) == 9 and all(row["jpeg_0"] < 0 and row["jpeg_1"] < 0 for row in rows)


def test_a_folder_of_pairs_is_read_as_training_reads_it(tmp_path):
    for side, level in (("w", 0), ("l", 255)):
        (tmp_path / side).mkdir()
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / side / "1.png")
    (tmp_path / "w" / "1.txt").write_text("a cat")
    (tmp_path / "w" / "._1.png").write_bytes(b"\0\5\26\7")
    items = list(read_items(tmp_path))
    assert [(item.prompt, item.image) for item in items] == [
        ("a cat", tmp_path / "w" / "1.png"),
        ("a cat", tmp_path / "l" / "1.png"),
    ]


def test_a_table_is_scored_by_the_columns_that_training_reads(tmp_path):
    """Every pair and list of the schemas, and an edit's source is not scored for the pair beside it."""
    lines = [
        ({"image_0": "a.png", "image_1": "b.png"}, [("_0", "a.png"), ("_1", "b.png")]),
        ({"img_better": "a.png", "img_worse": "b.png"}, [("_img_better", "a.png"), ("_img_worse", "b.png")]),
        ({"file_path": ["a.png", "b.png"]}, [("_0", "a.png"), ("_1", "b.png")]),
        ({"image": "s.png", "chosen": "a.png", "rejected": "b.png"},
         [("_chosen", "a.png"), ("_rejected", "b.png")]),
    ]  # fmt: skip
    table = tmp_path / "pairs.jsonl"
    table.write_text("".join(json.dumps({"original_prompt": "a cat", **row}) + "\n" for row, _ in lines))
    found = [(item.suffix, item.image) for item in read_items(table)]
    assert found == [(suffix, tmp_path / name) for _, files in lines for suffix, name in files]
