"""Groups made from columns equal those made record by record."""

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from diffalign.data.batches import views
from diffalign.data.batches.regroup import identities, regrouped
from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.geometry import Cut
from diffalign.data.encoding.records import EncodedImage, Record
from diffalign.data.reading.dense import Dense
from diffalign.errors import UserError

CUT = Cut((8, 8), (8, 8), (0, 0), (8, 8), 0, 0.0)


def image(number):
    return EncodedImage(
        f"{number:032x}", f"{number + 100:032x}" if number % 2 else None, CUT, f"{number:032x}"
    )


def record(draw, row):
    """Return a random group of 1 to 4 of nine images, with what a group may have."""
    count = int(draw.integers(1, 5))
    some = lambda make: tuple(make(i) for i in range(count)) if draw.random() < 0.5 else ()  # noqa: E731
    votes = some(lambda i: float(draw.random())) if count > 1 else ()
    labels = tuple(tuple(map(float, draw.integers(0, 3, 2))) for _ in range(count))
    return Record(
        prompt=f"prompt {row % 3}",
        text=f"{row % 3:032x}",
        images=tuple(image(int(i)) for i in draw.integers(0, 9, count)),
        scores=tuple(map(float, draw.integers(0, 3, count))),
        where=f"row {row}",
        texts=some(lambda i: f"{int(draw.integers(5)):032x}"),
        rewards=tuple((float(draw.random()), float(draw.integers(3))) for _ in range(count)),
        patches=some(lambda i: f"{i:032x}" if i else None),
        weight=float(draw.random()),
        dense=Dense(labels, ((0,), (0, 1))) if count > 1 and draw.random() < 0.2 else None,
        votes=votes,
        hashes=some(lambda i: int(draw.integers(2**63))),
        source=image(7) if draw.random() < 0.3 else None,
        time_labels=(1, 0, -1) if draw.random() < 0.3 else (),
    )


def part(record, images):
    """Return some images of a record, by definition."""
    pick = lambda values: tuple(values[i] for i in images) if values else ()  # noqa: E731
    names = ("images", "scores", "texts", "rewards", "patches", "hashes")
    new = replace(record, **{name: pick(getattr(record, name)) for name in names})
    dense = record.dense.of(images) if record.dense else None
    new = replace(new, dense=dense, votes=pick(record.votes) if len(images) > 1 else ())
    return replace(new, text=new.texts[0], texts=()) if record.texts and len(images) == 1 else new


@pytest.fixture(params=["all", "some"])
def columns(request):
    """Random groups, all of a table or some of it in another order."""
    draw = np.random.default_rng(0)
    every = Columns.of(record(draw, row) for row in range(60))
    return every if request.param == "all" else every.take(draw.permutation(60)[:40])


def test_single_images(columns):
    groups, picks = columns.every_image(np.arange(len(columns)))
    wanted = [part(r, (i,)) for r in columns for i in range(len(r.images))]
    assert list(regrouped(columns, groups, picks)) == wanted
    numbers, seen = identities(columns, groups, picks), {}
    own = [seen.setdefault((r.images[0].content, r.text), len(seen)) for r in wanted]
    assert numbers.tolist() == own


def test_pairs(columns):
    rivals = columns.take(np.flatnonzero(columns.sizes > 1))
    wanted = []
    for group in rivals:
        for two in combinations(range(len(group.images)), 2):
            pair = part(group, two)
            if len(group.images) == 2 or not pair.is_tie:
                wanted.append(pair)
    assert list(views._pairs(rivals)) == wanted
    with pytest.raises(UserError, match=r"data\.view is pairs, but the image has no rival"):
        views._pairs(columns)


def test_likes(columns):
    found = {}
    for group in columns:
        if group.is_tie:
            continue
        for i, score in enumerate(group.scores):
            single = part(group, (i,))
            liked = score > 0 if len(group.images) == 1 else score == max(group.scores)
            key = single.images[0].content, single.text
            earlier = found.setdefault(key, replace(single, scores=(float(liked),)))
            found[key] = replace(earlier, scores=(max(earlier.scores[0], float(liked)),))
    assert list(views._likes(columns)) == list(found.values())


def test_the_best_by_the_sum_of_ranks(columns):
    found = {}
    for group in columns:
        for i in range(len(group.images)):
            single = part(group, (i,))
            found.setdefault((single.images[0].content, single.text), replace(single, scores=(1.0,)))
    singles = list(found.values())
    rewards = np.array([single.rewards[0] for single in singles])
    ranks = [sum((rewards[:, j] < row[j]).sum() for j in range(2)) for row in rewards]
    best = sorted(sorted(range(len(singles)), key=lambda i: -ranks[i])[:7])
    assert list(views._experts(columns, 7)) == [singles[i] for i in best]


def test_likes_of_a_large_set_make_no_record(monkeypatch):
    groups = [record(np.random.default_rng(row), row) for row in range(50)]
    columns = Columns.of(replace(group, dense=None) for group in groups)
    monkeypatch.setattr("diffalign.data.encoding.columns.record_from", SimpleNamespace())
    assert len(views._likes(columns)) > 0
