"""One encoded set as pairs, likes and demonstrations, and single images in the share that is asked for."""

from collections import Counter

import pytest

from diffalign.config.schema import DataConfig
from diffalign.data import PairSource, encode_preferences, read_preferences
from diffalign.errors import UserError
from tests.data.conftest import Family, Model, png, write_jsonl


@pytest.fixture
def see(tmp_path):
    """see(entries, view, ...): the set of those json lines, images by number."""
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(png(number))

    def make(entries, view, model=None, **settings):
        path = write_jsonl(tmp_path / "p.jsonl", entries)
        config = DataConfig(path=str(path), resolution=16, view=view, **settings)
        preferences = read_preferences(config)
        return encode_preferences(model or Model(), preferences, config, tmp_path / "c", False)

    return make


def pair(prompt, winner, loser, **more):
    return {"prompt": prompt, "chosen": f"{winner}.png", "rejected": f"{loser}.png", **more}


def ranked(prompt, images, scores, **more):
    return {"prompt": prompt, "images": [f"{i}.png" for i in images], "scores": scores, **more}


def like(prompt, image, liked, **more):
    return {"prompt": prompt, "image": f"{image}.png", "liked": liked, **more}


PAIRS = [pair("a", 0, 1), pair("a", 1, 2), pair("a", 2, 3), pair("b", 3, 0)]


def seen(encoded):
    """(prompt, the seeds of the images, scores) of each group."""
    from diffalign.data.reading.examples import digest

    number = {digest(png(seed)): seed for seed in range(12)}
    return [(r.prompt, tuple(number[i.content] for i in r.images), r.scores) for r in encoded]


def test_an_image_that_ever_won_is_liked_once(see):
    model = Model()
    likes = see([*PAIRS, ranked("c", [4, 5], [1, 1])], "likes", model)
    assert seen(likes) == [
        ("a", (0,), (1,)), ("a", (1,), (1,)), ("a", (2,), (1,)), ("a", (3,), (0,)),
        ("b", (3,), (1,)), ("b", (0,), (0,)),
    ]  # fmt: skip
    assert likes.counts.text == "4 liked and 2 disliked images, 0 rows without label, 0 unreadable"
    assert model.images == 6
    again = Model()
    see([*PAIRS, ranked("c", [4, 5], [1, 1])], "auto", again)
    assert not again.batches  # a view encodes nothing


def test_turned_labels_turn_the_likes(see):
    likes = see([pair("a", 0, 1)], "likes", flip_labels=1.0)
    assert seen(likes) == [("a", (0,), (0,)), ("a", (1,), (1,))]


def test_only_the_best_of_a_list_is_liked_and_likes_stay_likes(see):
    likes = see([ranked("a", [0, 1, 2], [1, 3, 2]), like("a", 1, False), like("b", 4, True)], "likes")
    assert seen(likes) == [("a", (0,), (0,)), ("a", (1,), (1,)), ("a", (2,), (0,)), ("b", (4,), (1,))]


def test_demonstrations_are_the_best_of_each_group(see):
    entries = [*PAIRS[:1], ranked("b", [1, 2, 3], [5, 7, 7]), like("c", 4, False), like("d", 5, True)]
    best = see(entries, "demonstrations")
    assert seen(best) == [("a", (0,), (1,)), ("b", (2,), (1,)), ("b", (3,), (1,)), ("d", (5,), (1,))]
    assert best.counts.text == "4 demonstrations, 0 rows without label, 0 unreadable"


def test_experts_are_the_best_by_reward_of_all(see):
    entries = [
        pair("a", 0, 1, rewards=[0.1, 0.9]),
        pair("b", 2, 3, rewards=[0.5, 0.5]),
        pair("a", 1, 4, rewards=[0.9, 0.8]),
    ]
    assert [images for _, images, _ in seen(see(entries, "demonstrations", best=2))] == [(1,), (4,)]
    assert [images for _, images, _ in seen(see(entries, "demonstrations", best=3))] == [(1,), (2,), (4,)]
    assert len(see(entries, "demonstrations", best=99)) == 5


def test_several_rewards_rank_together(see):
    entries = [ranked("a", [0, 1, 2], [1, 2, 3], rewards=[[1, 300], [2, 400], [3, 100]])]
    assert [images for _, images, _ in seen(see(entries, "demonstrations", best=1))] == [(1,)]


def test_lists_as_pairs(see):
    pairs = see(
        [ranked("a", [0, 1, 2], [1, 3, 1], rewards=[4, 5, 6]), pair("b", 3, 4, rewards=[1, 2])], "pairs"
    )
    assert seen(pairs) == [("a", (0, 1), (1, 3)), ("a", (1, 2), (3, 1)), ("b", (3, 4), (1, 0))]
    assert pairs[1].rewards == ((5,), (6,))
    assert pairs.counts.text == "3 pairs, 0 ties, 0 rows without label, 0 unreadable"


def test_caption_pairs_as_likes_are_one_image_under_two_prompts(see):
    entries = [{"prompt": "a", "altered": "b", "image": "0.png"}]
    likes = see(entries, "likes")
    assert seen(likes) == [("a", (0,), (1,)), ("a", (0,), (0,))]
    prompts = [likes.text(record)["text_embeds"].item() for record in likes]
    assert prompts == [97.0, 98.0]


@pytest.mark.parametrize(
    ("entries", "view", "settings", "message"),
    [
        (
            [like("a", 0, True)],
            "pairs",
            {},
            "line 1: data.view is pairs, but the image has no rival; allowed: a",
        ),
        (PAIRS, "demonstrations", {"best": 3}, "line 1: data.best is 3, but there is no reward to find"),
        (PAIRS, "likes", {"best": 3}, "data.best is 3; it is for data.view demonstrations, not likes"),
        ([like("a", 0, False)], "demonstrations", {}, "nothing to learn from: 0 pairs"),
    ],
)
def test_views_that_a_set_does_not_bear(see, entries, view, settings, message):
    for _ in range(2):  # the second time the set is encoded already
        with pytest.raises(UserError, match=message):
            see(entries, view, **settings)


# the share of likes


def drawn(encoded, share, count, window=1, **settings):
    config = DataConfig(likes_share=share, posterior="mean", **settings)
    source = PairSource(encoded, Family(), config, window)
    batches = [source.batch(step) for step in range(count // window)]
    return [
        (score, text)
        for b in batches
        for score, text in zip(b.score.tolist(), b.cond["text_embeds"][:, 0].tolist(), strict=True)
    ]


@pytest.fixture
def likes(see):
    return see([like(chr(97 + i), i, i < 4) for i in range(10)], "auto")


@pytest.mark.parametrize("share", [0.8, 0.25, 0.0, 1.0])
def test_likes_come_in_their_share_and_each_as_often(likes, share):
    visits = drawn(likes, share, 400)
    liked = Counter(text for score, text in visits if score == 1)
    disliked = Counter(text for score, text in visits if score == 0)
    assert liked.total() == 400 * share
    assert not liked or (max(liked.values()) - min(liked.values()) <= 1 and len(liked) == 4)
    assert not disliked or (max(disliked.values()) - min(disliked.values()) <= 1 and len(disliked) == 6)


def test_the_share_is_no_pattern_and_none_leaves_the_set_as_it_is(likes):
    scores = [score for score, _ in drawn(likes, 0.5, 400)]
    assert 60 < sum(scores[::2]) < 140  # not every other one
    natural = [score for score, _ in drawn(likes, None, 100)]
    assert sum(natural) == 40 and sum(natural[:10]) == 4


def test_how_the_work_is_cut_does_not_change_which_likes_come(likes):
    assert drawn(likes, 0.8, 240, window=8) == drawn(likes, 0.8, 240)
    config = DataConfig(likes_share=0.8, posterior="mean")
    ranks = [PairSource(likes, Family(), config, 2, accumulation=2, rank=rank, world=2) for rank in range(2)]
    pieces = [ranks[r].batch(step).score.tolist() for step in range(30) for r in range(2)]
    assert [score for piece in pieces for score in piece] == [score for score, _ in drawn(likes, 0.8, 120)]


def test_sets_of_one_kind_are_not_mixed(see):
    only = see([like("a", 0, True), like("b", 1, True)], "auto")
    assert [score for score, _ in drawn(only, 0.5, 6)] == [1.0] * 6
