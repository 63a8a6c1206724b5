"""Rewards against labels and against each other: hand arithmetic, and the command on real sets."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, kendalltau

from diffalign.cli import main
from diffalign.config.schema import DataConfig
from diffalign.data import read_preferences
from diffalign.errors import UserError
from diffalign.evaluation.agreement import Group, rate, report
from diffalign.rewards.scoring.cache import ScoreCache
from diffalign.rewards.scoring.score import Scorer
from tests.helpers import PUBLISHED_DATA

# (labels, scores by the first reward, by the second)
PAIRS = [
    ((1, 0), (5.0, 1.0), (2.0, 1.0)),  # both right, by 4 and 1
    ((0, 1), (2.0, 3.0), (1.0, 0.0)),  # right by 1, wrong
    ((1, 0), (0.0, 2.0), (0.0, 3.0)),  # both wrong, by 2 and 3
    ((1, 0), (1.0, 1.0), (4.0, 0.0)),  # equal, right
    ((0, 1), (0.0, 8.0), (0.0, 1.0)),  # both right, by 8 and 1
    ((0.5, 0.5), (3.0, 0.0), (1.0, 0.0)),  # a tie on which they agree
]


def groups(pairs):
    return [
        Group(f"row {i}", labels, tuple(zip(first, second, strict=True)))
        for i, (labels, first, second) in enumerate(pairs)
    ]


def test_accuracy_by_hand():
    found = report(groups(PAIRS), ["a", "b"], bins=2)
    assert (found.pairs, found.ties) == (6, 1)
    a, b = found.accuracies
    assert (a.pairs, a.right, a.wrong, a.equal) == (5, 3, 1, 1) and (b.right, b.wrong, b.equal) == (3, 2, 0)
    assert a.accuracy.value == pytest.approx(3.5 / 5) and b.accuracy.value == pytest.approx(3 / 5)
    interval = binomtest(3, 5).proportion_ci(method="wilson")
    assert (b.accuracy.low, b.accuracy.high) == pytest.approx((interval.low, interval.high))
    # margins of a: 4, 1, 2, 0, 8, so the median is 2: the lower half is wrong once, equal once, right once
    assert [(one.low, one.high, one.pairs, one.accuracy.value) for one in a.by_margin] == [
        (0, 2, 3, 0.5),
        (4, 8, 2, 1.0),
    ]
    assert (a.median_margin, a.median_margin_of_ties) == (2, 3)


def test_agreement_by_hand():
    (one,) = report(groups(PAIRS), ["a", "b"]).agreements
    # decided by both: rows 0, 1, 2, 4 and 5; on row 1 they differ
    assert (one.pairs, one.undecided, one.same.value) == (5, 1, 0.8)
    assert one.tau == pytest.approx(0.6)
    interval = binomtest(4, 5).proportion_ci(method="wilson")
    assert (one.same.low, one.same.high) == pytest.approx((interval.low, interval.high))


def test_tau_is_kendalls_and_lists_are_all_their_pairs():
    random = np.random.default_rng(0)
    scores = random.standard_normal((7, 2))
    found = report([Group("x", tuple(range(7)), tuple(map(tuple, scores)))], ["a", "b"])
    assert found.pairs == 21 and found.ties == 0
    assert found.agreements[0].tau == pytest.approx(kendalltau(scores[:, 0], scores[:, 1]).statistic)
    tau = kendalltau(range(7), scores[:, 0]).statistic
    assert 2 * found.accuracies[0].accuracy.value - 1 == pytest.approx(tau)


def test_order_scale_and_turning_round():
    whole = report(groups(PAIRS), ["a", "b"], bins=3)
    turned = [(labels[::-1], first[::-1], second[::-1]) for labels, first, second in PAIRS]
    assert report(groups(turned), ["a", "b"], bins=3) == whole  # the position says nothing
    against = [((1 - labels[0], 1 - labels[1]), first, second) for labels, first, second in PAIRS]
    for one, other in zip(whole.accuracies, report(groups(against), ["a", "b"]).accuracies, strict=True):
        assert one.accuracy.value == pytest.approx(1 - other.accuracy.value)


def test_equal_margins_are_in_one_bin():
    same = [((1, 0), (1.0, 0.0), (1.0, 0.0))] * 4 + [((1, 0), (0.0, 3.0), (0.0, 0.0))]
    a, b = report(groups(same), ["a", "b"]).accuracies
    assert [(one.low, one.pairs, one.accuracy.value) for one in a.by_margin] == [(1, 4, 1.0), (3, 1, 0.0)]
    assert sum(one.pairs for one in b.by_margin) == 5


def test_nothing_to_measure():
    with pytest.raises(UserError, match="all 1 labelled pairs are ties"):
        report(groups(PAIRS[-1:]), ["a", "b"])
    undecided = [((1, 0), (1.0, 0.0), (0.0, 0.0))]
    (one,) = report(groups(undecided), ["a", "b"]).agreements
    assert (one.pairs, one.undecided, one.same) == (0, 1, None)
    with pytest.raises(ValueError, match="0 bins"):
        report(groups(PAIRS), ["a", "b"], bins=0)


@dataclass
class Light:
    asked: list = field(default_factory=list)

    def __call__(self, images, prompts):
        self.asked += prompts
        return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])


@pytest.fixture
def labelled(tmp_path):
    """Write a pair, a list of three, one with a broken image, a tie, and a single like."""
    for level in (10, 20, 30):
        Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / f"{level}.png")
    (tmp_path / "broken.png").write_bytes(b"none")
    rows = [
        {"prompt": "a", "images": ["10.png", "20.png"], "scores": [0, 1]},
        {"prompt": "b", "images": ["10.png", "30.png", "20.png"], "scores": [3, 2, 1]},
        {"prompt": "c", "images": ["10.png", "broken.png"], "scores": [1, 0]},
        {"prompt": "d", "images": ["30.png", "20.png"], "scores": [1, 1]},
        {"prompt": "e", "image": "10.png", "liked": True},
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "set.jsonl"


def test_a_labelled_set_is_scored_once(labelled, tmp_path):
    light, cache = Light(), ScoreCache(tmp_path / "scores.sqlite")
    for _ in range(2):
        preferences = read_preferences(DataConfig(path=str(labelled)))
        rated = rate(preferences, [Scorer("light", light, "key")], cache, progress=False)
    assert len(light.asked) == 8  # not twice, and neither the broken one nor the like
    assert [(g.labels, g.scores) for g in rated.groups] == [
        ((0, 1), ((10,), (20,))),
        ((3, 2, 1), ((10,), (30,), (20,))),
        ((1, 1), ((30,), (20,))),
    ]
    assert rated.singles == 1
    assert len(rated.unreadable) == 1 and "set.jsonl line 3 image_1" in rated.unreadable[0]
    found = report(rated.groups, ["light"])
    # right: the pair, and 30 above 20 of the list; wrong: 10 before 30, 10 before 20
    assert (found.pairs, found.ties, found.accuracies[0].right, found.accuracies[0].wrong) == (5, 1, 2, 2)


def test_a_set_without_rivals_or_images(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "e", "image": "10.png", "liked": True}))
    with pytest.raises(UserError, match=r"nothing to compare: 1 liked|nothing to compare: 1 demonstration"):
        rate(read_preferences(DataConfig(path=str(tmp_path / "x.jsonl"))), [Scorer("light", Light())])
    row = {"prompt": "c", "images": ["no.png", "broken.png"], "scores": [1, 0]}
    (tmp_path / "y.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"no group can be read; the first: y.jsonl line 1 image_0"):
        rate(read_preferences(DataConfig(path=str(tmp_path / "y.jsonl"))), [Scorer("light", Light())])


def test_the_command_on_the_embedded_pairs(tmp_path, capsys):
    """The judge drew the labels; the little CLIP was trained on other scenes; taste says nothing of them."""
    argv = ["agreement", "tiny:pairs", "--rewards", "judge,tiny_clip,taste", "--limit", "80"]
    argv += ["--cache", str(tmp_path / "scores.sqlite")]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == found["groups"] == 80 and 0 < found["ties"] < 10
    judge, clip, taste = found["rewards"]
    assert judge["accuracy"]["value"] > 0.99 and clip["accuracy"]["low"] > 0.75
    assert taste["accuracy"]["value"] == 0.5 == taste["equal"] / taste["pairs"] / 2
    shares = [one["accuracy"]["value"] for one in clip["by_margin"]]
    assert len(shares) == 4 and shares[0] < 0.85 < shares[-1]  # surer is righter
    assert found["agreement"][0]["same"]["low"] > 0.75 and found["agreement"][1]["same"] is None
    assert main([*argv, "--limit", "10"]) == 0
    said = capsys.readouterr().out
    assert "pairs with a winner" in said and "judge   tiny_clip" in said


def test_real_pick_a_pic_rows(tmp_path, capsys):
    source = str(PUBLISHED_DATA / "pairs" / "pickapic.parquet")
    argv = ["agreement", source, "--rewards", "jpeg,jpeg_incompressibility", "--bins", "2", "--json"]
    assert main([*argv, "--cache", str(tmp_path / "c")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pairs"], found["ties"], found["unlabelled"]) == (8, 1, 1)
    one, other = found["rewards"]
    assert one["right"] == other["wrong"] and one["pairs"] == 7
    assert found["agreement"][0]["tau"] == -1


def test_labelled_videos(tmp_path, capsys):
    source = str(PUBLISHED_DATA / "videoalign" / "example.csv")
    argv = [
        "agreement",
        source,
        "--rewards",
        "jpeg",
        "--label",
        "VQ",
        "--cache",
        str(tmp_path / "c"),
        "--json",
    ]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == 2 and found["unreadable"] == []


def test_bad_input_is_named(labelled, capsys):
    for argv, words in [
        (["none.jsonl", "--rewards", "jpeg"], "no such file"),
        ([str(labelled), "--rewards", "jpgg"], "did you mean jpeg"),
        ([str(labelled), "--rewards", ","], "names nothing"),
    ]:
        assert main(["agreement", *argv]) == 2
        assert words in capsys.readouterr().err
