"""Properties on random inputs: contrast, schedules, geometry, order."""

import math
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.config.schema import DataConfig
from diffalign.data.batches.order import Order
from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.geometry import Cut, buckets, cuts
from diffalign.data.encoding.records import EncodedImage, Record
from diffalign.diffusion.paths import RectifiedFlow, path_from_config
from diffalign.diffusion.randomness import Streams, permutation
from diffalign.diffusion.times import shifted
from diffalign.losses.contrast import contrast, pairs_of
from tests.helpers import SD_SCHEDULER

settings.register_profile("few", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("few")

groups = st.lists(st.integers(0, 3), min_size=1, max_size=9)
scores = st.sampled_from([0.0, 0.5, 1.0, 2.5])
sides = st.integers(16, 3000)


def samples(data, group):
    """Random log-ratios and scores of a batch with these groups."""
    ratio = data.draw(st.lists(st.floats(-3, 3, width=32), min_size=len(group), max_size=len(group)))
    score = data.draw(st.lists(scores, min_size=len(group), max_size=len(group)))
    return torch.tensor(ratio), torch.tensor(score), torch.tensor(group)


@given(groups)
def test_pairs_are_every_two_rivals_once(group):
    first, second = pairs_of(torch.tensor(group))
    found = sorted(zip(first.tolist(), second.tolist(), strict=True))
    every = [(i, j) for i in range(len(group)) for j in range(i + 1, len(group)) if group[i] == group[j]]
    assert found == sorted(every)


@given(groups, st.data())
def test_contrast_puts_the_better_first_and_weighs_ties_by_nothing(group, data):
    ratio, score, group = samples(data, group)
    c = contrast(ratio, score, group)
    assert torch.equal(c.chosen, ratio[c.better]) and torch.equal(c.rejected, ratio[c.worse])
    assert torch.equal(c.gap, score[c.better] - score[c.worse]) and bool((c.gap >= 0).all())
    assert torch.equal(c.weight, (c.gap > 0).float())


@given(groups, st.data())
def test_contrast_of_turned_scores_is_turned(group, data):
    ratio, score, group = samples(data, group)
    c, turned = contrast(ratio, score, group), contrast(ratio, -score, group)
    assert torch.equal(c.margin * c.weight, -turned.margin * turned.weight)
    assert torch.equal(c.gap, turned.gap)


@given(groups, st.data(), st.randoms(use_true_random=False))
def test_contrast_does_not_depend_on_the_order_of_samples(group, data, random):
    ratio, score, group = samples(data, group)
    order = list(range(len(group)))
    random.shuffle(order)
    told = lambda c: sorted(zip(c.margin.tolist(), c.gap.tolist(), c.weight.tolist(), strict=True))  # noqa: E731
    decided = lambda rows: [row for row in rows if row[2]]  # noqa: E731
    assert decided(told(contrast(ratio, score, group))) == decided(
        told(contrast(ratio[order], score[order], group[order]))
    )


@given(
    st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    st.integers(2, 1000),
    st.floats(1e-5, 0.01),
    st.floats(0.011, 0.05),
)
def test_variance_is_preserved_and_noise_grows(kind, steps, start, end):
    config = {**SD_SCHEDULER, "beta_schedule": kind, "num_train_timesteps": steps}
    path, _ = path_from_config(config | {"beta_start": start, "beta_end": end})
    t = torch.arange(steps, dtype=torch.float64) / steps
    alpha, sigma = path.coefficients(t)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(steps, dtype=torch.float64))
    assert bool((sigma.diff() > 0).all()) and path.index(t).tolist() == list(range(steps))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.1, 12), st.floats(0.1, 12))
def test_shifts_compose_keep_the_ends_and_the_order(times, one, other):
    t = torch.tensor([0.0, *sorted(times), 1.0], dtype=torch.float64)
    torch.testing.assert_close(shifted(shifted(t, one), other), shifted(t, one * other))
    moved = shifted(t, one)
    assert moved[0] == 0 and abs(moved[-1] - 1) < 1e-12 and bool((moved.diff() >= 0).all())
    alpha, sigma = RectifiedFlow().coefficients(moved)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(moved))


@given(
    st.lists(st.tuples(sides, sides), min_size=1, max_size=3),
    st.sampled_from(["center", "random"]),
    st.text(),
)
def test_a_cut_covers_its_target_and_stays_inside(sizes, crop, content):
    config = DataConfig(path="x", resolution=512, buckets=True, crop=crop)
    found = cuts(sizes, config, content)
    assert len({cut.target for cut in found}) == 1
    for cut in found:
        for axis in (0, 1):
            assert 0 <= cut.corner[axis] <= cut.resized[axis] - cut.target[axis]
        fit = max(cut.target[axis] / cut.original[axis] for axis in (0, 1))
        for axis in (0, 1):  # the aspect is kept to half a pixel
            assert abs(cut.resized[axis] - cut.original[axis] * fit) <= 0.5 + 1e-9
        assert cut.mirrored_corner[1] + cut.corner[1] + cut.target[1] == cut.resized[1]


@given(st.integers(2, 40), st.sampled_from([8, 16, 32, 64]))
def test_buckets_are_on_the_grid_within_the_area_and_symmetric(count, step):
    resolution = count * step
    found = buckets(resolution, step)
    assert found and set(found) == {(width, height) for height, width in found}
    for height, width in found:
        assert height % step == width % step == 0 and height * width <= resolution**2
        assert max(height, width) <= 2 * min(height, width)


@given(st.integers(1, 30), st.integers(0, 2**31), st.integers(1, 4))
def test_an_epoch_serves_every_group_once_from_any_position(count, seed, epochs):
    image = EncodedImage("0" * 32, None, Cut((64, 64), (64, 64), (0, 0), (64, 64)), "0" * 32)
    records = Columns.of([Record("a cat", "0" * 32, (image, image), (1.0, 0.0), "row 0")] * count)
    order = Order(records, DataConfig(path="x"), 1, seed)
    served = [order.at(position) for position in range(count * epochs)]
    assert Counter(served) == dict.fromkeys(range(count), epochs)
    for epoch in range(epochs):
        assert sorted(served[epoch * count : (epoch + 1) * count]) == list(range(count))
    resumed = Order(records, DataConfig(path="x"), 1, seed)
    half = count * epochs // 2
    assert [resumed.at(position) for position in range(half, count * epochs)] == served[half:]


@given(st.integers(0, 2**31), st.integers(0, 50), st.integers(1, 6), st.integers(0, 6))
def test_randomness_of_a_group_is_its_own_whatever_its_batch(seed, position, count, cut):
    cut = min(cut, count)
    whole = Streams.at(seed, position, count).normal(count, (3,))
    parts = [Streams.at(seed, position, cut).normal(cut, (3,))] if cut else []
    parts += [Streams.at(seed, position + cut, count - cut).normal(count - cut, (3,))] if count > cut else []
    assert torch.equal(whole, torch.cat(parts))
    assert math.isfinite(float(whole.sum())) and sorted(permutation(count, seed).tolist()) == list(
        range(count)
    )
