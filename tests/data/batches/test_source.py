import threading
from collections import Counter
from dataclasses import replace
from io import BytesIO
from itertools import islice

import pytest
import torch

import diffalign.data.batches.source as source_module
from diffalign.config.schema import DataConfig
from diffalign.data import PairSource, fixed_batches, split_holdout
from diffalign.data.batches.ahead import ahead
from diffalign.data.batches.source import assemble
from diffalign.errors import UserError
from tests.data.conftest import Family, picture, row

SQUARE, WIDE = ((40, 40), (40, 40)), ((80, 40), (72, 40))
MANY = {"flip": True, "prompt_dropout": 0.4, "crop": "random"}


@pytest.fixture
def bucketed(encoded):
    """10 square and 5 wide pairs of 16 x 16 and 8 x 24 pixels or so, flips encoded."""
    rows = [row(i, sizes=WIDE if i % 3 == 2 else SQUARE) for i in range(15)]
    return encoded(rows, resolution=32, buckets=True, bucket_step=8, flip=True)


def source(encoded, batch_size=2, accumulation=1, rank=0, world=1, seed=0, workers=0, **settings):
    config = DataConfig(workers=workers, **{**MANY, **settings})
    return PairSource(
        encoded, Family(), config, batch_size, accumulation=accumulation, rank=rank, world=world, seed=seed
    )


def take(source, count):
    return list(islice(source, count))


def joined(batches):
    """Return the groups of several batches as one: x, cond, score, groups renumbered."""
    offsets = [sum(batch.num_groups for batch in batches[:i]) for i in range(len(batches))]
    cond = {name: torch.cat([batch.cond[name] for batch in batches]) for name in batches[0].cond}
    group = torch.cat([batch.group + offset for batch, offset in zip(batches, offsets, strict=True)])
    return (
        torch.cat([batch.x for batch in batches]),
        cond,
        group,
        torch.cat([batch.score for batch in batches]),
    )


def same(first, second):
    for a, b in zip(first, second, strict=True):
        if isinstance(a, dict):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        else:
            assert torch.equal(a, b)


def test_a_batch_has_rivals_adjacent_and_everything_of_a_sample(bucketed):
    batch = source(bucketed, batch_size=3).batch(0)
    assert batch.x.shape[0] == 6 and batch.x.dtype == torch.float32
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2] and batch.group.dtype == torch.int64
    assert sorted(batch.score[:2].tolist()) == [0.0, 1.0] and batch.score.dtype == torch.float32
    assert {name: tensor.shape[0] for name, tensor in batch.cond.items()} == {
        "encoder_hidden_states": 6, "text_embeds": 6, "time_ids": 6,
    }  # fmt: skip


def test_how_a_step_is_cut_changes_nothing(bucketed):
    whole = take(source(bucketed, batch_size=8), 6)
    pieces = take(source(bucketed, batch_size=1, accumulation=8), 48)
    for step in range(6):
        same(joined(pieces[8 * step : 8 * step + 8]), joined([whole[step]]))


def test_two_processes_are_one_of_twice_the_batch(bucketed):
    one = take(source(bucketed, batch_size=4, accumulation=2), 8)
    ranks = [take(source(bucketed, batch_size=2, accumulation=2, rank=rank, world=2), 8) for rank in range(2)]
    for step in range(8):
        same(joined([ranks[0][step], ranks[1][step]]), joined([one[step]]))


def test_seeking_is_having_iterated(bucketed):
    straight = take(source(bucketed, batch_size=2, accumulation=3), 40)
    sought = source(bucketed, batch_size=2, accumulation=3)
    for start in (31, 7):  # forwards and backwards
        sought.seek(start)
        for a, b in zip(take(sought, 9), straight[start : start + 9], strict=True):
            same(joined([a]), joined([b]))


def test_workers_change_nothing_and_leave_the_global_generator_alone(bucketed):
    plain = source(bucketed, workers=0)
    prefetched = source(bucketed, workers=2)
    for each in (plain, prefetched):
        each.seek(3)
    state = torch.get_rng_state()
    batches = take(prefetched, 5)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(batches, take(plain, 5), strict=True):
        same(joined([a]), joined([b]))


@pytest.mark.parametrize("depth", [1, 5])
def test_reading_ahead_changes_nothing(bucketed, depth):
    plain, early = source(bucketed, prefetch=0), source(bucketed, prefetch=depth)
    for each in (plain, early):
        each.seek(3)
    state = torch.get_rng_state()
    for a, b in zip(take(early, 12), take(plain, 12), strict=True):
        same(joined([a]), joined([b]))
    assert torch.equal(state, torch.get_rng_state())


def test_batches_are_made_before_they_are_due(bucketed):
    made, ready = [], threading.Event()
    early = source(bucketed, prefetch=2)
    inner = early.batch

    def batch(step):
        made.append(step)
        if len(made) == 3:
            ready.set()
        return inner(step)

    early.batch = batch
    batches = iter(early)
    next(batches)
    assert ready.wait(30) and sorted(made) == [0, 1, 2]  # the one that was due and two ahead


def test_an_error_of_reading_ahead_is_raised_where_its_batch_is_due():
    def make(number):
        if number == 2:
            raise UserError("damaged")
        return number

    batches = ahead(make, range(4), 3)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(UserError, match="damaged"):
        next(batches)
    assert next(batches) == 3
    with pytest.raises(StopIteration):
        next(batches)


def test_seeds_differ(bucketed):
    first, second = source(bucketed, seed=0).batch(0), source(bucketed, seed=1).batch(0)
    assert first.x.shape != second.x.shape or not torch.equal(first.x, second.x)


def test_every_epoch_visits_every_pair_once(encoded):
    whole = encoded([row(i, prompt=chr(97 + i)) for i in range(7)])
    batches = take(source(whole, batch_size=1, flip=False, prompt_dropout=0.0), 21)
    seen = [batch.cond["text_embeds"][0, 0].item() for batch in batches]
    epochs = [seen[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == [float(97 + i) for i in range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_step_holds_one_bucket_and_buckets_come_by_size(bucketed):
    targets = Counter()
    for step in range(150):
        batches = [source(bucketed, batch_size=1, accumulation=2, rank=r, world=2).batch(2 * step + m) for m in (0, 1) for r in (0, 1)]  # noqa: E501 # fmt: skip
        (target,) = {tuple(batch.cond["time_ids"][0, 4:].tolist()) for batch in batches}
        targets[target] += 1
    assert 80 <= targets[(32.0, 32.0)] <= 120  # of 150, two thirds expected
    assert len(targets) == 2


@pytest.mark.parametrize("own", [False, True], ids=["one size a group", "own sizes"])
def test_flips_are_the_pairs_and_mirror_the_conditions(encoded, own):
    """Sizes are the first image's for all of a group, unless each is told its own: those tell who won."""
    whole = encoded([row(0, sizes=((60, 40), (90, 40)))], **{**MANY, "prompt_dropout": 0.0})
    batches = take(source(whole, batch_size=1, posterior="mean", prompt_dropout=0.0, own_sizes=own), 40)
    record = whole[0]
    flipped = 0
    for batch in batches:
        is_flipped = torch.equal(batch.x[0], whole.moments(record.images[0], True)[0])
        flipped += is_flipped
        for index, image in enumerate(record.images):
            assert torch.equal(batch.x[index], whole.moments(image, is_flipped)[0])
            cut = (image if own else record.images[0]).cut
            corner = cut.mirrored_corner if is_flipped else cut.corner
            assert batch.cond["time_ids"][index].tolist() == [*cut.original, *corner, 16, 16]
    assert 8 <= flipped <= 32
    assert record.images[0].cut.original == (40, 60) and record.images[1].cut.original == (40, 90)


def test_prompt_dropout_has_its_share_and_is_the_pairs(encoded):
    whole = encoded([row(i) for i in range(8)])
    batches = take(source(whole, batch_size=8, flip=False, prompt_dropout=0.25), 100)
    dropped = torch.cat([batch.cond["text_embeds"][:, 0] == 0 for batch in batches]).reshape(-1, 2)
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert abs(dropped[:, 0].float().mean() - 0.25) < 4 * (0.25 * 0.75 / 800) ** 0.5
    for share, expected in ((0.0, False), (1.0, True)):
        batch = source(whole, batch_size=8, flip=False, prompt_dropout=share).batch(0)
        assert (batch.cond["text_embeds"][:, 0] == 0).tolist() == [expected] * 16


def test_posterior_noise_is_each_images_own_and_has_its_scale(encoded):
    again = BytesIO()  # the same pixels in another file: a pair of one file is left out
    picture(0).save(again, "PNG", compress_level=0)
    whole = encoded([{**row(0), "jpg_1": again.getvalue()}])
    batches = take(source(whole, batch_size=1, flip=False, prompt_dropout=0.0), 300)
    mean, std = whole.moments(whole[0].images[0])
    z = torch.stack([(batch.x - mean) / std for batch in batches])  # (300, 2, 3, 2, 2)
    assert z.mean().abs() < 4 / z.numel() ** 0.5
    assert (z.std() - 1).abs() < 0.05
    correlation = (z[:, 0] * z[:, 1]).mean()
    assert correlation.abs() < 4 / z[:, 0].numel() ** 0.5
    means = take(source(whole, batch_size=1, flip=False, posterior="mean"), 3)
    assert all(torch.equal(batch.x, torch.stack([mean, mean])) for batch in means)


def test_ties_keep_equal_scores(encoded):
    whole = encoded([row(0, (0.5, 0.5)), row(1)])
    rows = {tuple(batch.score.tolist()) for batch in take(source(whole, batch_size=1, flip=False), 4)}
    assert rows == {(0.5, 0.5), (1.0, 0.0)}


def test_an_empty_set_is_an_error(encoded):
    nothing = split_holdout(encoded([row(0)]), 0.0, 1, seed=0)[1]
    with pytest.raises(UserError, match="no pairs to train on"):
        source(nothing)


def test_fixed_batches_are_made_when_they_are_asked_for(bucketed, monkeypatch):
    config, made = DataConfig(posterior="sample"), []
    listed = list(fixed_batches(bucketed, Family(), config, 4))
    monkeypatch.setattr(source_module, "assemble", lambda *given: made.append(1) or assemble(*given))
    lazy = source_module.FixedBatches(bucketed, Family(), config, 4)
    assert len(lazy) == len(listed) == 5 and not made
    for number in (3, 0, 3):
        assert torch.equal(lazy[number].x, listed[number].x)
    assert len(made) == 3 and [b.num_groups for b in lazy[1:]] == [b.num_groups for b in listed[1:]]


def test_fixed_batches_show_every_group_once_without_flip_and_dropout(bucketed):
    config = DataConfig(**MANY)
    batches = list(fixed_batches(bucketed, Family(), config, batch_size=4))
    assert [batch.num_groups for batch in batches] == [4, 1, 4, 4, 2]
    prompts = Counter(value for batch in batches for value in batch.cond["text_embeds"][::2, 0].tolist())
    assert prompts == Counter(float(sum(map(ord, record.prompt))) for record in bucketed)
    for a, b in zip(batches, fixed_batches(bucketed, Family(), config, batch_size=4), strict=True):
        same(joined([a]), joined([b]))


def test_votes_are_in_the_batch_and_nan_where_nobody_voted(encoded):
    whole = encoded([row(0), row(1)])
    voted = whole.holding([replace(whole[0], votes=(0.75, 0.25)), whole[1]])
    assert "votes" in voted.extras and "votes" not in whole.extras
    batch = next(fixed_batches(voted, Family(), DataConfig(), 2))
    assert batch.extra["votes"][:2].tolist() == [0.75, 0.25] and batch.extra["votes"][2:].isnan().all()
