"""From images to pairs that the reader accepts: preferences, dropped images, written files."""

import io
import json
import re

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from diffalign.cli import main
from diffalign.config.schema import DataConfig
from diffalign.data import read_preferences
from diffalign.media.videos import Video, write_video
from diffalign.tiny import pairs_path
from tests.helpers import PUBLISHED_DATA


def noise(level: float, size: int = 32, seed: int = 0) -> Image.Image:
    """Grey with noise of this standard deviation: the more of it, the larger its JPEG."""
    random = np.random.default_rng(seed)
    return Image.fromarray(
        (128 + level * random.standard_normal((size, size, 3))).clip(0, 255).astype("uint8")
    )


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two prompts of three and four images, among them two equal ones; a third prompt of one image."""
    place = tmp_path / "images"
    place.mkdir()
    levels = {"a": [20, 0, 60], "b": [5, 80, 5, 40], "c": [1]}
    for prompt, several in levels.items():
        for number, level in enumerate(several):
            noise(level).save(place / f"{prompt}{number}.png")
            (place / f"{prompt}{number}.txt").write_text(f"prompt {prompt}")
    return place


def run(capsys, *argv):
    assert main(["pairs", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def read(path, **config):
    return list(read_preferences(DataConfig(path=str(path), **config)))


def winners(examples):
    return [
        (
            one.prompt,
            one.images[int(np.argmax(one.scores))].read(),
            one.images[int(np.argmin(one.scores))].read(),
        )
        for one in examples
    ]


def test_images_scored_paired_and_read_again(folder, tmp_path, capsys):
    table, output = tmp_path / "scores.jsonl", tmp_path / "out" / "pairs.parquet"
    argv = ["score", str(folder), "--rewards", "jpeg_incompressibility", "--output", str(table)]
    assert main(argv) == 0
    capsys.readouterr()
    counts = run(capsys, table, "--output", output)
    assert {name: counts[name] for name in ("made", "images", "prompts", "duplicates")} == {
        "made": 2, "images": 8, "prompts": 3, "duplicates": 1,
    }  # fmt: skip
    assert counts["prompts_with_one_image"] == 1 and counts["rewards"] == ["jpeg_incompressibility"]
    files = lambda *names: [(folder / f"{name}.png").read_bytes() for name in names]  # noqa: E731
    expected = [("prompt a", *files("a2", "a1")), ("prompt b", *files("b1", "b0"))]
    assert winners(read(output)) == expected
    rows = parquet.read_table(output).to_pylist()
    assert [(row["label_0"], row["label_1"]) for row in rows] == [(0, 1), (0, 1)]
    assert [row["best_image_uid"] == row["image_1_uid"] for row in rows] == [True, True]
    scores = {row["file"]: row["jpeg_incompressibility"] for row in map(json.loads, table.open())}
    assert rows[0]["rewards"] == [[scores[str(folder / "a1.png")]], [scores[str(folder / "a2.png")]]]
    assert sorted(p.name for p in output.parent.iterdir()) == ["pairs.parquet"]


def test_scored_here_it_is_the_same_and_always_the_same(folder, tmp_path, capsys):
    names = ["one.parquet", "two.parquet", "three.parquet"]
    assert main(["score", str(folder), "--rewards", "jpeg", "--output", str(tmp_path / "t.parquet")]) == 0
    capsys.readouterr()
    sources = [[folder, "--rewards", "jpeg"], [folder, "--rewards", "jpeg"], [tmp_path / "t.parquet"]]
    for name, source in zip(names, sources, strict=True):
        run(capsys, *source, "--output", tmp_path / name, "--choose", "all")
    one, two, three = ((tmp_path / name).read_bytes() for name in names)
    assert one == two == three


def test_a_table_of_embedded_pairs(tmp_path, capsys):
    """Images of one prompt are rivals wherever they stand in the source."""
    rows = [("x", 0, 60), ("y", 10, 20), ("x", 60, 30)]  # the second 60 of x is the first again
    table = {
        "caption": [prompt for prompt, _, _ in rows],
        "jpg_0": [png(noise(level)) for _, level, _ in rows],
        "jpg_1": [png(noise(level)) for _, _, level in rows],
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "set.parquet")
    argv = ["score", str(tmp_path / "set.parquet"), "--rewards", "jpeg_incompressibility"]
    assert main([*argv, "--output", str(tmp_path / "s.jsonl")]) == 0
    capsys.readouterr()
    counts = run(capsys, tmp_path / "s.jsonl", "--output", tmp_path / "p.parquet", "--choose", "all")
    assert (counts["made"], counts["duplicates"]) == (4, 1)
    level = {png(noise(n)): n for n in (0, 10, 20, 30, 60)}
    found = [(prompt, level[won], level[lost]) for prompt, won, lost in winners(read(tmp_path / "p.parquet"))]
    assert found == [("x", 60, 0), ("x", 30, 0), ("x", 60, 30), ("y", 20, 10)]
    assert main(["pairs", str(tmp_path / "s.jsonl"), "--output", str(tmp_path / "p.jsonl")]) == 2
    assert "no names; allowed: a name that ends in .parquet" in capsys.readouterr().err


def test_ranked_lists_and_ties(folder, tmp_path, capsys):
    output = tmp_path / "lists.jsonl"
    run(capsys, folder, "--rewards", "jpeg_incompressibility", "--choose", "list", "--output", output)
    first, second = read(output)
    assert [len(first.images), len(second.images)] == [3, 3]
    assert np.argsort(first.scores).tolist() == [1, 0, 2] and len(first.rewards[0]) == 1
    every = [
        (reward, score)
        for one in (first, second)
        for (reward,), score in zip(one.rewards, one.scores, strict=True)
    ]
    low, high = min(reward for reward, _ in every), max(reward for reward, _ in every)
    for reward, score in every:  # gains in [0, 1], whatever the reward's range
        assert score == pytest.approx((reward - low) / (high - low))
    assert json.loads(output.read_text().splitlines()[0])["images"][0] == "images/a0.png"
    run(
        capsys,
        folder,
        "--rewards",
        "jpeg_incompressibility",
        "--choose",
        "list",
        "--output",
        tmp_path / "l.parquet",
    )
    (again, _) = read(tmp_path / "l.parquet")
    assert again.scores == first.scores
    assert [i.read() for i in again.images] == [i.read() for i in first.images]
    argv = [folder, "--rewards", "jpeg", "--tie", "100", "--ties", "keep", "--output", output]
    counts = run(capsys, *argv)
    assert counts["ties_kept"] == counts["made"] == 2
    assert [example.is_tie for example in read(output)] == [True, True]


def test_several_rewards_with_weights(folder, tmp_path, capsys):
    """Two opposite rewards: the heavier one wins by rank, and equal weights are ties."""
    output = tmp_path / "p.parquet"
    both = "jpeg_incompressibility,{}*jpeg"
    counts = run(capsys, folder, "--rewards", both.format(0.5), "--output", output)
    assert counts["combine"] == "rank" and counts["made"] == 2
    heavier = winners(read(output))
    run(capsys, folder, "--rewards", both.format(3), "--output", output)
    assert [(p, won, lost) for p, lost, won in winners(read(output))] == heavier
    argv = ["pairs", str(folder), "--rewards", both.format(1), "--output", str(output)]
    assert main(argv) == 2
    assert "nothing to write" in capsys.readouterr().err
    for how in ("sum", "wins"):
        counts = run(capsys, folder, "--rewards", both.format(-1), "--combine", how, "--output", output)
        assert counts["made"] == 2 and winners(read(output)) == heavier
    run(
        capsys, folder, "--rewards", both.format(0.5), "--combine", "sum", "--standardise", "--output", output
    )
    assert winners(read(output)) == heavier


def test_near_duplicates(tmp_path, capsys):
    base, other = (noise(40, 5, seed).resize((64, 64), Image.Resampling.BICUBIC) for seed in (0, 1))
    base.save(tmp_path / "a.png")
    base.save(tmp_path / "b.jpg", quality=75)
    base.resize((128, 128), Image.Resampling.BICUBIC).save(tmp_path / "c.png")
    other.save(tmp_path / "d.png")
    (tmp_path / "p.txt").write_text("a cat\n")
    argv = [tmp_path, "--prompts", tmp_path / "p.txt", "--rewards", "jpeg", "--choose", "all"]
    argv += ["--output", tmp_path / "out" / "p.parquet"]
    assert run(capsys, *argv)["made"] == 6
    counts = run(capsys, *argv, "--dedup", "near")
    assert (counts["made"], counts["duplicates"]) == (1, 2)
    assert run(capsys, *argv, "--dedup", "near", "--near", 0)["made"] == 6


def test_videos_become_json_lines(tmp_path, capsys):
    for level in (10, 50):
        frames = torch.full((2, 3, 16, 16), level, dtype=torch.uint8)
        write_video(Video(frames, 8.0), tmp_path / f"{level}.mp4")
        (tmp_path / f"{level}.txt").write_text("abc")
    argv = [tmp_path, "--rewards", "jpeg_incompressibility", "--output", tmp_path / "p.jsonl"]
    counts = run(capsys, *argv, "--ties", "keep")
    assert counts["made"] == 1
    (example,) = read(tmp_path / "p.jsonl", frames=1)
    assert [image.source.name for image in example.images] == ["10.mp4", "50.mp4"]
    assert "videos" in json.loads((tmp_path / "p.jsonl").read_text())
    argv = [
        "pairs",
        str(tmp_path),
        "--rewards",
        "jpeg",
        "--ties",
        "keep",
        "--output",
        str(tmp_path / "p.parquet"),
    ]
    assert main(argv) == 2
    assert "videos are not embedded" in capsys.readouterr().err
    assert main([*argv[:-1], str(tmp_path / "p.jsonl"), "--dedup", "near"]) == 2
    assert "near duplicates" in capsys.readouterr().err


def test_bad_input_is_named_and_nothing_is_written(folder, tmp_path, capsys):
    assert main(["score", str(folder), "--rewards", "jpeg", "--output", str(tmp_path / "s.jsonl")]) == 0
    table, output = str(tmp_path / "s.jsonl"), tmp_path / "x" / "p.parquet"
    for argv, words in [
        ([str(folder)], "--rewards must say"),
        ([str(folder), "--rewards", "jpgg"], "did you mean jpeg"),
        ([table, "--rewards", "pickscore"], "unknown reward of .*s.jsonl 'pickscore'; allowed: jpeg"),
        ([table, "--margin", "1e9"], "2 pairs below the margin"),
        ([table, "--top", "2"], "--top 2 is for --choose top-bottom"),
        ([table, "--choose", "list", "--max-pairs", "2"], "a prompt has one list"),
        ([str(tmp_path / "none")], "--rewards must say"),
        ([str(tmp_path / "none"), "--rewards", "jpeg"], "no file or folder"),
    ]:
        assert main(["pairs", *argv, "--output", str(output)]) == 2
        said = capsys.readouterr().err
        assert re.search(words, said), said
        assert not output.exists()
    assert main(["pairs", table, "--output", str(tmp_path / "p.csv")]) == 2
    assert "must end in .parquet or .jsonl" in capsys.readouterr().err


def test_what_has_changed_or_gone_since_it_was_scored(folder, tmp_path, capsys):
    argv = ["score", str(folder), "--rewards", "jpeg", "--output", str(tmp_path / "s.jsonl")]
    assert main(argv) == 0
    (folder / "a1.png").unlink()
    assert main(["pairs", str(tmp_path / "s.jsonl"), "--output", str(tmp_path / "p.parquet")]) == 0
    said = capsys.readouterr()
    assert "skipped, unreadable" in said.err and "a1.png" in said.err and "1 unreadable image" in said.out
    row = {"prompt": "now", "image": "images/a0.png"}
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    row = {"file": str(tmp_path / "set.jsonl"), "row": 1, "prompt": "then", "jpeg": -1.5}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["pairs", str(tmp_path / "t.jsonl"), "--output", str(tmp_path / "p.parquet")]) == 2
    assert "score it again" in capsys.readouterr().err


def test_pairs_of_the_embedded_set_train(tmp_path, capsys):
    """The judge's own pairs are those of the set, and two steps on them run."""
    output = tmp_path / "pairs.parquet"
    run(
        capsys,
        pairs_path(),
        "--rewards",
        "judge",
        "--limit",
        40,
        "--cache",
        tmp_path / "c",
        "--output",
        output,
    )
    labelled = {one.prompt: one for one in read(pairs_path(), limit=20)}
    for one in read(output):
        other = labelled[one.prompt]
        best = lambda group: group.images[int(np.argmax(group.scores))].read()  # noqa: E731
        assert best(one) == best(other)
    argv = ["train", "--model.path", "tiny:sdxl", "--data.path", str(output), "--data.resolution", "32"]
    argv += [
        "--training.steps",
        "2",
        "--training.batch_size",
        "2",
        "--data.limit",
        "4",
        "--data.holdout",
        "0",
    ]
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0
    assert "pairs, 0 ties" in capsys.readouterr().err


def test_real_pick_a_pic_rows(tmp_path, capsys):
    """Four images of one prompt, in six rows, are four rivals."""
    source = PUBLISHED_DATA / "pairs" / "pickapic.parquet"
    counts = run(capsys, source, "--rewards", "jpeg", "--choose", "all", "--output", tmp_path / "p.parquet")
    assert counts["duplicates"] >= 8 and counts["made"] >= 6
    assert all(not one.is_tie for one in read(tmp_path / "p.parquet"))


def test_an_image_that_was_damaged_since_it_was_scored_is_left_out(folder, tmp_path, capsys):
    assert main(["score", str(folder), "--rewards", "jpeg", "--output", str(tmp_path / "s.jsonl")]) == 0
    whole = (folder / "a0.png").read_bytes()
    (folder / "a0.png").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    counts = run(capsys, tmp_path / "s.jsonl", "--output", tmp_path / "p.jsonl", "--choose", "all")
    assert counts["unreadable"] == 1
    used = {
        name
        for line in (tmp_path / "p.jsonl").read_text().splitlines()
        for name in json.loads(line)["images"]
    }
    assert used and not any(name.endswith("a0.png") for name in used)


def test_an_infinite_score_is_no_score_and_is_told(folder, tmp_path, capsys):
    """json has no word for infinity, but Python writes and reads one."""
    table, out = tmp_path / "scores.jsonl", tmp_path / "pairs.jsonl"
    assert main(["score", str(folder), "--rewards", "jpeg", "--output", str(table)]) == 0
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    best = max((row for row in rows if row["prompt"] == "prompt a"), key=lambda row: -row["jpeg"])
    best["jpeg"] = float("inf")
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert main(["pairs", str(table), "--output", str(out)]) == 0
    assert f"{best['file']}: no finite score by jpeg" in capsys.readouterr().err
    used = [image for row in map(json.loads, out.read_text().splitlines()) for image in row["images"]]
    assert used and not any(best["file"].endswith(image.rpartition("/")[2]) for image in used)
