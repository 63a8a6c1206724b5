import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffalign.config.schema import FilterConfig
from diffalign.data.encoding import filters
from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.content import content_digest
from diffalign.data.encoding.filters import agreeing, agreement_split, margin
from diffalign.data.encoding.hashing import dhash, distances
from diffalign.data.encoding.records import Record
from diffalign.errors import UserError
from tests.data.conftest import png, row

REWARDS = [[0.9, 0.8], [0.1, 0.9]]  # of the two images: one reward agrees with the label (1, 0), one does not


def rows():
    """Six pairs: a tie, a repeat of the first, one with small images, a long prompt, a forbidden word."""
    plain = [row(number, rewards=REWARDS) for number in range(6)]
    plain[1] = {**row(1, (0.5, 0.5)), "rewards": REWARDS}
    plain[2] = dict(plain[0])
    plain[3] = {**row(3, sizes=((40, 20), (40, 40))), "rewards": REWARDS}
    plain[4]["caption"] = "p" * 50
    plain[5]["caption"] = "a Forbidden word"
    return plain


@pytest.mark.parametrize(
    ("filters", "left", "told"),
    [
        ({"words": ("forbidden",)}, [0, 1, 2, 3, 4], "1 left out by data.filters (words)"),
        ({"min_prompt": 9}, [4, 5], "4 left out by data.filters (prompt length)"),
        ({"max_prompt": 20}, [0, 1, 2, 3, 5], "1 left out by data.filters (prompt length)"),
        ({"min_side": 30}, [0, 1, 2, 4, 5], "1 left out by data.filters (size)"),
        ({"repeats": True}, [0, 1, 3, 4, 5], "1 left out by data.filters (repeats)"),
        ({"agree": 1}, [0, 1, 2, 3, 4, 5], "0 left out by data.filters (agreement)"),
        ({"agree": 2, "words": ("p",)}, [], None),
        ({"min_margin": 0.3}, [0, 1, 2, 3, 4, 5], "0 left out by data.filters (margin)"),
        ({"max_prompt": 20, "repeats": True}, [0, 1, 3, 5], "1 left out by data.filters (repeats)"),
    ],
)
def test_filters_leave_out_what_they_say_and_count_it(encoded, filters, left, told):
    if not left:
        with pytest.raises(UserError, match=r"nothing to learn from.*left out by data.filters \(words\)"):
            encoded(rows(), filters=FilterConfig(**filters))
        return
    whole = encoded(rows(), filters=FilterConfig(**filters))
    assert [int(record.where.split()[-1]) for record in whole] == left
    assert told in whole.counts.text and whole.counts.usable + whole.counts.ties == len(left)


def test_agreement_and_margin_of_rewards(encoded):
    whole = encoded(rows()).records
    assert agreeing(whole).tolist() == [1, 0, 1, 1, 1, 1]
    assert margin(whole) == pytest.approx([0.35, 0, 0.35, 0.35, 0.35, 0.35])
    with pytest.raises(UserError, match=r"nothing to learn from: 0 pairs, 1 tie,"):
        encoded(rows(), filters=FilterConfig(agree=2))


def test_a_classifiers_score_filters_and_is_no_reward(encoded):
    table = [row(number, rewards=[[0.5, number / 4], [0.4, 0.0]]) for number in range(4)]
    left = encoded(table, filters=FilterConfig(nsfw=1, max_nsfw=0.5))
    assert [record.rewards for record in left] == [((0.5,), (0.4,))] * 3
    assert "1 left out by data.filters (nsfw)" in left.counts.text
    with pytest.raises(UserError, match=r"data.filters.nsfw is 2, but an image has 2 rewards"):
        encoded(table, filters=FilterConfig(nsfw=2))


def test_filters_by_reward_need_rewards(encoded):
    with pytest.raises(UserError, match=r"data.filters.agree compares rivals by reward, but there is no"):
        encoded([row(0), {**row(1), "jpg_0": png(9)}], filters=FilterConfig(agree=1))


def test_the_split_of_semi_dpo(encoded):
    """Pairs whose label k of five rewards confirm, and the others, against counting pair by pair."""
    draw = np.random.default_rng(0)
    opinions = draw.random((12, 2, 5))
    labels = [(1.0, 0.0) if won else (0.0, 1.0) for won in draw.random(12) < 0.5]
    labels[7] = (0.5, 0.5)
    table = [row(i, labels[i], rewards=opinions[i].tolist()) for i in range(12)]
    confirmed = [
        12 if i == 7 else int((opinions[i][labels[i].index(1.0)] > opinions[i][labels[i].index(0.0)]).sum())
        for i in range(12)
    ]
    clean, others = agreement_split(encoded(table), 3)
    of = lambda part: [int(record.where.split()[-1]) for record in part]  # noqa: E731
    assert of(clean) == [i for i in range(12) if confirmed[i] >= 3] and 0 < len(others) < 11
    assert of(others) == [i for i in range(12) if confirmed[i] < 3]
    kept = encoded(table, filters=FilterConfig(agree=3, agree_keep="others"))
    assert list(kept) == list(others)
    assert f"{len(clean)} left out by data.filters (agreement: the others are kept)" in kept.counts.text
    with pytest.raises(UserError, match=r"data.filters.agree_keep is 'others', but data.filters.agree is 0"):
        encoded(table, filters=FilterConfig(agree_keep="others"))


def scene(seed, quality=None, side=96):
    """Return a drawn scene as a PNG, or as a JPEG of some quality."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (96, 96), tuple(draw.integers(0, 256, 3).tolist()))
    for _ in range(6):
        box = sorted(draw.integers(0, 96, 2).tolist()), sorted(draw.integers(0, 96, 2).tolist())
        (left, right), (top, bottom) = box
        color = tuple(draw.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).rectangle((left, top, right + 4, bottom + 4), color)
    buffer = io.BytesIO()
    image.resize((side, side)).save(
        buffer, "JPEG" if quality else "PNG", **({"quality": quality} if quality else {})
    )
    return buffer.getvalue()


def test_the_difference_hash():
    ramp = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8), (80, 1)))
    assert dhash(ramp) == 2**64 - 1 and dhash(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    upper = Image.fromarray(np.vstack([np.asarray(ramp)[:40], np.asarray(ramp)[:40, ::-1]]))
    assert dhash(upper) >> 32 == 2**32 - 1  # the first bits are of the upper rows
    one = np.array([0, 2**64 - 1, 0b1011], np.uint64)
    assert distances(one[:, None], one[None]).tolist() == [[0, 64, 3], [64, 0, 61], [3, 61, 0]]
    hashes = [dhash(Image.open(io.BytesIO(scene(1, *more)))) for more in ((), (60,), (90, 64))]
    other = dhash(Image.open(io.BytesIO(scene(2))))
    assert max(distances(np.uint64(hashes[0]), np.array(hashes, np.uint64))) <= 4
    assert distances(np.uint64(hashes[0]), np.uint64(other)) > 10


def test_near_duplicates_are_left_out(encoded):
    def pair(number, one, other, prompt="a"):
        return {**row(number, prompt=prompt), "jpg_0": one, "jpg_1": other}

    table = [
        pair(0, scene(1), scene(2)),
        pair(1, scene(2, 70), scene(1, 70)),  # the first again, compressed and the other way round
        pair(2, scene(1), scene(3)),  # one image is another
        pair(3, scene(1, 70), scene(2, 70), prompt="b"),  # another prompt
        pair(4, scene(1, 60, 80), scene(2, 60, 80)),  # smaller as well
    ]
    left = encoded(table, filters=FilterConfig(near=6))
    assert [int(record.where.split()[-1]) for record in left] == [0, 2, 3]
    assert "2 left out by data.filters (near duplicates)" in left.counts.text
    assert all(len(record.hashes) == 2 for record in left)
    assert len(encoded(table, filters=FilterConfig(repeats=True))) == 5  # no file is the same
    likes = encoded(table, filters=FilterConfig(near=6), view="likes")
    assert [record.hashes[0] for record in likes][:1] == [left[0].hashes[0]]
    assert not encoded(table)[0].hashes


def test_content_from_columns(encoded):
    whole = encoded([row(i, (0.5, 0.5) if i == 4 else (1.0, 0.0), rewards=REWARDS) for i in range(7)]).records
    parts = Columns.of([*whole][2:6])
    assert content_digest(whole.take([2, 3, 4, 5])) == content_digest(parts)
    known = {content_digest(parts)}
    first, *others = parts
    for other in (
        replace(first, prompt="q"),
        replace(first, scores=(0.0, 1.0)),
        replace(first, rewards=((0.0, 0.8), (0.1, 0.9))),
        replace(first, weight=0.5),
        replace(first, images=first.images[::-1]),
        replace(first, patches=(first.text, None)),
        replace(first, patches=(None, first.text)),
        replace(first, texts=(first.text, first.text)),
    ):
        known.add(content_digest(Columns.of([other, *others])))
    assert len(known) == 9
    assert content_digest(whole.take([3, 2, 4, 5])) not in known


def test_near_duplicates_of_many_groups_as_the_definition_has_it(monkeypatch):
    """Greedy, by rows: against a plain loop, in runs above and below the bound of the joint rounds."""
    rng = np.random.default_rng(0)
    words = [[int(v) for v in rng.integers(0, 8, 2)] for _ in range(300)]  # distances of at most 3 bits
    prompts = [f"p{n}" for n in rng.integers(0, 30, 300)]
    encoded = [
        Record(p, "0" * 32, (), (1.0, 0.0), f"r {i}", hashes=tuple(w))
        for i, (p, w) in enumerate(zip(prompts, words, strict=True))
    ]
    kept: list[int] = []
    for i, (p, (a, b)) in enumerate(zip(prompts, words, strict=True)):
        near = lambda x, y: bin(x ^ y).count("1") <= 1  # noqa: E731
        alike = (
            all(near(x, c) or near(x, d) for x in (a, b)) and all(near(x, a) or near(x, b) for x in (c, d))
            for j in kept
            if prompts[j] == p
            for c, d in [words[j]]
        )
        if not any(alike):
            kept.append(i)
    assert 100 < len(kept) < 250
    columns = Columns.of(encoded)
    monkeypatch.setattr(Columns, "sizes", np.full(300, 2))  # the images themselves do not matter
    for rounds in (32, 2):
        monkeypatch.setattr(filters, "ROUNDS", rounds)
        assert np.flatnonzero(filters._no_near_duplicate(columns, 1)).tolist() == kept
