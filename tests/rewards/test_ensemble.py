"""Several rewards as one, by a file: arithmetic, names, the cache, videos, times, and bad files."""

import json
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from diffalign.cli import main
from diffalign.config.schema import RolloutConfig
from diffalign.errors import UserError
from diffalign.media.videos import Video
from diffalign.rewards import load
from diffalign.rewards.ensemble import Member, TimedEnsemble, ensemble_of, read_members
from diffalign.rewards.images import to_pil
from diffalign.rewards.registry import parse
from diffalign.rewards.scoring.cache import ScoreCache, reward_key
from diffalign.rewards.scoring.items import read_items
from diffalign.rewards.scoring.rater import RewardRater
from diffalign.rewards.scoring.score import make_scorers, score
from diffalign.rewards.specs import weighted
from diffalign.rewards.videos import VideoReward
from diffalign.rewards.zoo.step_aware import TimedReward
from diffalign.rollout.judges import judge_of
from diffalign.tiny import pairs_path
from tests.rewards import conformance
from tests.rewards.conformance import covers

TWO = "members:\n  - {reward: judge, weight: 2, mean: 0.5, std: 0.25}\n  - {reward: jpeg, divide: 10}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(TWO)
    return path


@pytest.fixture(scope="module")
def items():
    return [item for item, _ in zip(read_items(pairs_path()), range(6), strict=False)]


def test_the_weighted_sum_of_normalised_scores(file, items):
    rows = score(items, make_scorers(["judge", "jpeg", f"ensemble:{file}"]), progress=False).rows
    for row in rows:
        for side in ("_0", "_1"):
            expected = 2 * (row[f"judge{side}"] - 0.5) / 0.25 + row[f"jpeg{side}"] / 10
            assert row[f"both{side}"] == pytest.approx(expected, rel=1e-6)


def test_it_is_a_reward_like_any_other(file):
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a large red circle"] * 3
    reward = load(f"ensemble:{file}")
    found = reward(pixels, prompts)
    expected = 2 * (load("judge")(pixels, prompts) - 0.5) / 0.25 + load("jpeg")(pixels, prompts) / 10
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32 and reward(pixels[:0], []).shape == (0,)
    assert parse(f"ensemble:{file}")[0].name == "both"
    assert weighted(f"0.5*ensemble:{file}").name == "both"


@covers("ensemble")
def test_it_keeps_to_what_all_rewards_keep_to(tmp_path):
    file, prompts = tmp_path / "x.yaml", ["a large red circle", "a small blue square"]
    file.write_text("members: [{reward: tiny_clip, mean: 20, std: 8}, {reward: jpeg, divide: 10}]")
    reward = load(f"ensemble:{file}")
    conformance.assert_shapes(reward, prompts)
    conformance.conforms_to_samples(
        lambda size: load(f"ensemble:{file}", batch_size=size),
        conformance.pictures(),
        conformance.some(prompts, 6),
    )
    images, words = conformance.pictures(), conformance.some(prompts, 6)
    single = load(f"ensemble:{file}", batch_size=1)
    torch.testing.assert_close(single(images, words), reward(images, words), rtol=0, atol=1e-5)


def test_gradients_flow_through_its_members(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("members: [{reward: tiny_clip, weight: 3, divide: 2}]")
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prompt = ["a red circle"]
    (own,) = torch.autograd.grad(load(f"ensemble:{file}")(pixels, prompt).sum(), pixels)
    (alone,) = torch.autograd.grad(load("tiny_clip")(pixels, prompt).sum(), pixels)
    torch.testing.assert_close(own, 1.5 * alone)


def test_the_cache_keeps_its_members(tmp_path, items):
    file, cache = tmp_path / "x.yaml", ScoreCache(tmp_path / "scores.sqlite")
    alone = score(items, make_scorers(["tiny_clip"]), cache, progress=False).rows
    asked = []

    @dataclass(frozen=True)
    class Asked:
        def __call__(self, images, prompts):
            asked.append(len(images))
            return torch.zeros(len(images))

    for weight in (2, 3):  # other weights cost nothing
        file.write_text(f"members: [{{reward: tiny_clip, weight: {weight}}}]")
        (scorer,) = make_scorers([f"ensemble:{file}"])
        assert scorer.is_cached and scorer.key is None
        object.__setattr__(scorer.parts[0], "reward", Asked())
        rows = score(items, [scorer], cache, progress=False).rows
        for row, other in zip(rows, alone, strict=True):
            assert row["x_0"] == pytest.approx(weight * other["tiny_clip_0"], rel=1e-6)
    assert asked == []


def test_its_identity_is_what_it_makes_of_what(tmp_path, file):
    same, other = tmp_path / "same.yaml", tmp_path / "other.yaml"
    same.write_text(TWO)
    other.write_text(TWO.replace("weight: 2", "weight: 1"))
    keys = [reward_key(f"ensemble:{path}") for path in (file, same, other)]
    assert keys[0] == keys[1] != keys[2]


def test_of_videos():
    frames = torch.full((4, 3, 8, 8), 51, dtype=torch.uint8)
    light = lambda images, prompts: torch.tensor([image.getpixel((0, 0))[0] / 255 for image in images])  # noqa: E731
    seconds = VideoReward("seconds", lambda videos, _: torch.tensor([len(v.frames) / v.fps for v in videos]))
    both = ensemble_of("x", [Member("a", 10.0), Member("b")], [light, seconds])
    assert both([Video(frames, 8.0)], ["p"]).tolist() == pytest.approx([2.5])
    with pytest.raises(UserError, match="'x' judges videos"):
        both([Image.new("RGB", (4, 4))], ["p"])


def test_of_noisy_times():
    @dataclass(frozen=True)
    class Timed:
        def __call__(self, images, prompts):
            return self.at(images, prompts, torch.zeros(len(images)))

        def at(self, images, prompts, t):
            return 100 * t

    plain = lambda images, prompts: torch.ones(len(images))  # noqa: E731
    both = ensemble_of("x", [Member("a", 2.0), Member("b")], [Timed(), plain])
    assert isinstance(both, TimedEnsemble) and isinstance(both, TimedReward)
    assert both.at([0, 0], ["p", "p"], torch.tensor([0.0, 0.5])).tolist() == [1, 101]
    assert both([0], ["p"]).tolist() == [1]
    with pytest.raises(UserError, match="either"):
        ensemble_of("x", [Member("a"), Member("b")], [Timed(), VideoReward("v", plain)])


def test_rollouts_and_training_sets_take_it(file, tmp_path, items):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a large red circle", "a small blue square"]
    judge = judge_of(RolloutConfig(rewards=(f"0.5*ensemble:{file}", "jpeg")), torch.device("cpu"))
    assert (judge.rewards, judge.weights) == (("both", "jpeg"), (0.5, 1.0))
    found = judge.submit(pixels, prompts, torch.zeros(2)).result()
    torch.testing.assert_close(found[:, 0], load(f"ensemble:{file}")(to_pil(pixels), prompts))
    rater = RewardRater([f"ensemble:{file}", "judge"], tmp_path / "scores.sqlite")
    rows = rater([item.image for item in items], [item.prompt for item in items])
    scores = score(items, make_scorers([f"ensemble:{file}"]), progress=False).rows
    assert [row[0] for row in rows] == [row[f"both_{side}"] for row in scores for side in (0, 1)]
    before = rater.fingerprint
    file.write_text(TWO.replace("weight: 2", "weight: 3"))
    assert rater.fingerprint != before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("members: []", "allowed: a list"),
        ("{}", "allowed: a list"),
        ("rewards: [{reward: judge}]", "unknown field of .*'rewards'"),
        ("members: [judge]", "member 1 is 'judge'"),
        ("members: [{reward: jugde}]", "member 1: .*did you mean judge"),
        ("members: [{reward: judge, wieght: 1}]", "did you mean weight"),
        ("members: [{reward: judge, weight: 0}]", "weight is 0"),
        ("members: [{reward: judge, weight: heavy}]", "weight is 'heavy'"),
        ("members: [{reward: judge, weight: .nan}]", "weight is nan"),
        ("members: [{reward: judge, std: 0}]", "std is 0.0; allowed: above 0"),
        ("members: [{reward: judge, divide: -1}]", "divide is -1.0"),
        ("members: [{reward: judge, divide: 2, mean: 1}]", "divide beside mean or std"),
        ("members: [{reward: judge}, {reward: judge}]", "'judge' twice"),
        ("members: [{reward: 'ensemble:x.yaml'}]", "an ensemble itself"),
        ("members: [{reward: judge", "x.yaml"),
    ],
)
def test_bad_files_are_named(tmp_path, text, words):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        read_members(str(file))


def test_no_file_or_one_without_a_name(tmp_path):
    with pytest.raises(UserError, match=r"ensemble:FILE.yaml"):
        load("ensemble")
    with pytest.raises(UserError, match="no such file"):
        load(f"ensemble:{tmp_path}/none.yaml")
    with pytest.raises(UserError, match="letters"):
        load(f"ensemble:{tmp_path}/a b.yaml")


def test_score_takes_it(file, tmp_path, capsys):
    output = tmp_path / "scores.jsonl"
    argv = ["score", str(pairs_path()), "--limit", "6", "--output", str(output)]
    assert main([*argv, "--rewards", f"ensemble:{file},judge"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 3 and {"both_0", "both_1", "judge_0", "judge_1"} <= rows[0].keys()
    assert "both_0" in capsys.readouterr().out
