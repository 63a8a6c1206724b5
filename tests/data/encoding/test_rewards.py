"""Rewards beside labels, instead of labels, and the importance of a group."""

from zlib import crc32

import pytest
import torch

from diffalign.config.schema import DataConfig
from diffalign.data import PairSource, encode_preferences, fixed_batches, read_preferences
from diffalign.data.encoding.rating import rescored, wins
from diffalign.errors import UserError
from diffalign.rewards.scoring.rater import RewardRater
from tests.data.conftest import Family, Model, png, row, write_jsonl, write_parquet


class Rater:
    """Scores by a checksum of file and prompt; remembers what it was asked."""

    def __init__(self, columns=1, fingerprint="rater"):
        self.columns, self.fingerprint = columns, fingerprint
        self.calls: list[tuple[list[bytes], list[str]]] = []

    def __call__(self, images, prompts):
        self.calls.append((list(images), list(prompts)))
        return [self.of(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def of(self, image, prompt):
        return tuple(float(crc32(image + prompt.encode(), r) % 997) for r in range(self.columns))


def encode(path, folder, rater=None, model=None, seed=0, **settings):
    config = DataConfig(path=str(path), **{"resolution": 16, **settings})
    preferences = read_preferences(config, seed)
    return encode_preferences(model or Model(), preferences, config, folder, False, rater=rater)


@pytest.fixture
def path(tmp_path):
    return write_parquet(tmp_path / "p.parquet", [row(0), row(1, (0.5, 0.5)), row(2, (0.0, 1.0))])


@pytest.fixture
def jsonl(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return lambda entries: write_jsonl(tmp_path / "p.jsonl", entries)


def batch_of(encoded, **settings):
    return next(fixed_batches(encoded, Family(), DataConfig(**settings), 9))


def test_wins_are_counted_over_rewards_and_rivals_strictly():
    # first column 3 > 2 > 1 = 1, second 5 = 5 = 5 > 0; each of four images has 2 x 3 comparisons
    assert wins(((3, 5), (2, 5), (1, 5), (1, 0))) == (4 / 6, 3 / 6, 1 / 6, 0)
    assert wins(((1.0,), (0.0,))) == (1, 0)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_second_opinion_beside_the_label(path, tmp_path, columns):
    rater = Rater(columns)
    encoded = encode(path, tmp_path / "c", rater, cache_batch_size=2)
    assert [(len(images), prompts) for images, prompts in rater.calls] == [
        (4, ["prompt 0"] * 2 + ["prompt 1"] * 2),
        (2, ["prompt 2"] * 2),
    ]
    assert [record.scores for record in encoded] == [(1, 0), (0.5, 0.5), (0, 1)]
    expected = [rater.of(png(2 * i + side), f"prompt {i}") for i in range(3) for side in (0, 1)]
    reward = batch_of(encoded).extra["reward"]
    assert reward.shape == ((6,) if columns == 1 else (6, 3)) and reward.dtype == torch.float32
    assert reward.reshape(6, -1).tolist() == [list(each) for each in expected]


def test_nothing_is_scored_twice(path, tmp_path):
    first, again, other = Rater(), Rater(), Rater(fingerprint="other")
    one = encode(path, tmp_path / "c", first)
    assert list(encode(path, tmp_path / "c", again)) == list(one) and not again.calls
    encode(path, tmp_path / "c", other)
    assert other.calls


def test_batches_without_rewards_have_no_extra(path, tmp_path):
    batch = batch_of(encode(path, tmp_path / "c"))
    assert batch.extra == {} and batch.negative == {}


def test_a_reward_instead_of_the_label_but_a_tie_stays_a_tie(path, tmp_path):
    rater = Rater()
    encoded = encode(path, tmp_path / "c", rater, rewards_as="score")
    for i, record in enumerate(encoded):
        values = tuple(rater.of(png(2 * i + side), f"prompt {i}")[0] for side in (0, 1))
        assert record.scores == ((0.5, 0.5) if i == 1 else values)
    turned = encode(path, tmp_path / "c", Rater(), rewards_as="score", flip_labels=1.0)
    for record, other in zip(encoded, turned, strict=True):
        assert other.scores == record.scores[::-1] and other.rewards == record.rewards


def test_lists_without_scores_are_scored_by_wins(jsonl, tmp_path):
    entry = {"prompt": "a", "images": ["0.png", "1.png", "2.png"], "rewards": [[1, 9], [2, 8], [3, 8]]}
    encoded = encode(jsonl([entry]), tmp_path / "c", rewards_as="wins")
    assert encoded[0].scores == (2 / 4, 1 / 4, 2 / 4)
    assert encoded.counts.text == "1 list, 0 ties, 0 rows without label, 0 unreadable"
    # the file's rewards and the run's side by side
    more = encode(jsonl([entry]), tmp_path / "c", Rater(), rewards_as="wins")
    assert [reward[:2] for reward in more[0].rewards] == [(1, 9), (2, 8), (3, 8)]
    assert [reward[2:] for reward in more[0].rewards] == [Rater().of(png(i), "a") for i in range(3)]


def test_rows_without_label_count_as_such_where_labels_are_asked_for(jsonl):
    path = jsonl([{"prompt": "a", "images": ["0.png", "1.png"], "rewards": [1, 2]}])
    with pytest.raises(UserError, match="line 1: no preference columns; found images, prompt, rewards"):
        list(read_preferences(DataConfig(path=str(path), resolution=16)))


@pytest.mark.parametrize(
    ("scores", "rewards", "how", "message"),
    [
        ((1, 0), (), "score", "here: data.rewards_as is 'score', but there is no reward; name some"),
        ((1,), ((3.0,),), "wins", "here: data.rewards_as is 'wins', but the image has no rival; .*: extra"),
        ((1, 0), ((1, 2), (3, 4)), "score", "here: .*'score', but there are 2 rewards; allowed: one reward"),
    ],
)
def test_rewards_that_cannot_stand_for_labels(scores, rewards, how, message):
    with pytest.raises(UserError, match=message):
        rescored(scores, rewards, how, "here")


def test_rows_with_unequal_numbers_of_rewards(jsonl, tmp_path):
    entry = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    path = jsonl([{**entry, "rewards": [1, 2]}, entry])
    with pytest.raises(
        UserError, match=r"line 2: 0 rewards an image, but 1 in p.jsonl line 1; allowed: the same"
    ):
        encode(path, tmp_path / "c")


def test_weights_of_groups_reach_every_sample(jsonl, tmp_path):
    entry = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    encoded = encode(jsonl([{**entry, "weight": 0.25}, entry, {**entry, "weight": 3}]), tmp_path / "c")
    assert batch_of(encoded).extra["weight"].tolist() == [0.25, 0.25, 1, 1, 3, 3]


def test_what_guidance_guides_away_from(path, tmp_path):
    encoded = encode(path, tmp_path / "c")
    source = PairSource(encoded, Family(), DataConfig(), 2, guided=True)
    fixed = next(fixed_batches(encoded, Family(), DataConfig(), 2, guided=True))
    for batch in (source.batch(0), fixed):
        assert set(batch.negative) == {"encoder_hidden_states", "text_embeds"}
        assert batch.negative["encoder_hidden_states"].shape == (4, 3, 2)
        assert (batch.negative["text_embeds"] == -1).all()
        assert batch.select(torch.tensor([0, 2])).negative["text_embeds"].shape == (2, 1)


def test_the_registrys_rewards_score_files(tmp_path):
    from diffalign.tiny import sets

    rows = list(sets.rows("lists", 3))
    images, prompts = [i for r in rows for i in r["images"]], [r["prompt"] for r in rows for _ in range(4)]
    rater = RewardRater(("judge", "taste"), tmp_path / "scores.sqlite")
    scores = rater(images, prompts)
    assert [score[0] for score in scores] == pytest.approx([s for r in rows for s in r["scores"]])
    assert len(scores) == 12 and all(0 <= score[1] <= 1 for score in scores)
    assert rater.fingerprint == RewardRater(("judge", "taste"), tmp_path / "x").fingerprint
    assert rater.fingerprint != RewardRater(("taste", "judge"), tmp_path / "x").fingerprint
    with pytest.raises(UserError, match="reward 'judge' cannot read the prompt 'a cat'"):
        rater(images[:1], ["a cat"])
