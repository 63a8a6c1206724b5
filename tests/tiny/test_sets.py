from io import BytesIO
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from diffalign.media.videos import read_video
from diffalign.tiny import motion_judge, motions, patterns, sets
from diffalign.tiny.judge import judge
from diffalign.tiny.scenes import caption, parse, parse_things, scene_of, split_of


def picture(data):
    return Image.open(BytesIO(data)).convert("RGB")


def take(name, count=150, **more):
    return list(sets.rows(name, count, **more))


@pytest.mark.parametrize("name", sets.SETS)
def test_rows_are_of_the_train_split_and_a_short_set_begins_a_long_one(name):
    rows = take(name, 40)
    splits = {"video": motions.split_of, "pattern": patterns.split_of}
    split = splits.get(name.partition("_")[0], split_of)
    assert all(split(row["prompt"]) == "train" for row in rows)
    assert len({row["prompt"] for row in rows}) == 40
    assert take(name, 7) == rows[:7]
    assert take(name, 7, seed=1) != rows[:7]
    assert len(list(islice(sets.rows(name), sets.GROUPS))) == sets.GROUPS if name == "experts" else True


def test_every_caption_comes_once_before_one_comes_twice():
    prompts = [row["prompt"] for row in sets.rows("experts", 4096)]
    distinct = len(set(prompts))
    assert len(set(prompts[:distinct])) == distinct < 4096


def test_a_list_has_up_to_three_wrong_words_in_one_layout_and_the_judges_scores():
    best = []
    for row in take("lists"):
        pictures = [picture(data) for data in row["images"]]
        statements = len(parse(row["prompt"]))
        assert row["scores"] == [judge(image, row["prompt"]) for image in pictures]
        right = sorted(round(score * statements) for score in row["scores"])
        assert right[-1] == statements and right[-2] < statements and right[0] >= statements - 4
        best.append(int(np.argmax(row["scores"])))
        corners = {image.getpixel((0, 0)) for image in pictures}
        assert len(corners) == 1
    assert min(np.bincount(best, minlength=4)) > 20  # the best has no place of its own


def test_exactly_so_many_words_are_wrong():
    rng = np.random.default_rng(0)
    for text in ("a large red circle", "a large red circle above a small blue square"):
        scene = scene_of(text, rng)
        for wrong in range(4):
            other = sets.misdraw(scene, wrong, rng)
            assert other.layout == scene.layout and other.dark == scene.dark
            words = zip(parse(text), parse(caption(other)), strict=True)
            assert sum(a.value != b.value for a, b in words) == wrong


def test_likes_are_true_and_dislikes_are_not_in_equal_parts():
    rows = take("likes")
    scores = {liked: [judge(picture(r["image"]), r["prompt"]) for r in rows if r["liked"] is liked] for liked in (True, False)}  # noqa: E501 # fmt: skip
    assert set(scores[True]) == {1.0} and max(scores[False]) < 1
    assert 50 < len(scores[True]) < 100


def test_captions_are_right_and_wrong_of_one_true_picture():
    for row in take("captions", 60):
        image = picture(row["image"])
        assert judge(image, row["prompt"]) == 1 and judge(image, row["altered"]) < 1
        parse_things(row["altered"])


def test_experts_are_true():
    for row in take("experts", 60):
        assert row["liked"] is True and judge(picture(row["image"]), row["prompt"]) == 1


def test_weight_maps_are_white_where_both_pictures_agree():
    for row in take("patches", 30):
        true, other = (np.asarray(picture(data), dtype=int) for data in row["images"])
        maps = [np.asarray(Image.open(BytesIO(data))) for data in row["patches"]]
        assert row["scores"] == [1.0, 0.0] and (maps[0] == maps[1]).all()
        assert ((maps[0] == 255) == (abs(true - other).max(-1) <= 16)).all()
        assert 0.3 < (maps[0] == 255).mean() < 1 and set(np.unique(maps[0])) == {0, 255}
        assert judge(picture(row["images"][0]), row["prompt"]) == 1


def test_video_pairs_show_one_motion_and_their_labels_are_the_defects():
    dense, ties = 0, 0
    for row in take("video_pairs", 24):
        a, b = (read_video(data).frames.permute(0, 2, 3, 1).numpy() for data in row["videos"])
        assert a.shape == (motions.FRAMES, 32, 32, 3) and (a[0] == b[0]).all()  # no defect begins at once
        movers = motions.parse(row["prompt"])
        seen = [motion_judge.frame_scores(motion_judge.watch(clip, movers)) for clip in (a, b)]
        for scores, segments, whole in zip(seen, row["segments"], row["scores"], strict=True):
            assert len(segments) == 5 and row["segment_seconds"] == 0.5
            weights = np.array([4, 4, 4, 4, 1]) / 17
            assert np.dot(weights, segments) == pytest.approx(whole, abs=1e-3)
            for k in range(4):  # what the judge sees is in the labels; stutters it does not see
                assert segments[k] <= (scores[4 * k : 4 * k + 4] == 1).mean() + 1e-6
        dense += sum(x != y for x, y in zip(*row["segments"], strict=True))
        ties += row["scores"][0] == row["scores"][1]
    assert dense > 40 and ties < 9


def test_takes_of_a_caption_lose_by_speed():
    gap = []
    for row in take("video_takes", 40):
        clips = [read_video(data).frames.permute(0, 2, 3, 1).numpy() for data in row["videos"]]
        speeds = [motion_judge.dynamics(clip, row["prompt"]) for clip in clips]
        gap.append((speeds[0] - speeds[1]) * np.sign(row["scores"][0] - row["scores"][1]))
    assert np.mean(gap) < -0.2  # pixels a second: the winner is slower
