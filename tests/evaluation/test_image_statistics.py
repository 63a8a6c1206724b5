"""Values of the image statistics on pictures where they are known, and the alarm's thresholds."""

import numpy as np
import pytest
from PIL import Image

from diffalign.evaluation.measuring.image_statistics import (
    diversities,
    diversity,
    image_statistics,
    statistic_changes,
    thumbnail,
)


def image(array):
    return Image.fromarray(np.asarray(array, dtype=np.uint8))


def test_a_plain_picture_has_nothing():
    assert image_statistics(Image.new("RGB", (8, 8), (128, 128, 128))) == pytest.approx(
        {"saturation": 0, "edge_density": 0, "colour_entropy": 0, "sharpness": 0, "dark_fraction": 0},
        abs=1e-12,
    )


def test_black_is_dark_and_has_no_saturation():
    values = image_statistics(Image.new("RGB", (8, 8)))
    assert values["dark_fraction"] == 1.0 and values["saturation"] == 0.0


def test_saturation_of_pure_and_half_colours():
    assert image_statistics(Image.new("RGB", (4, 4), (255, 0, 0)))["saturation"] == 1.0
    assert image_statistics(Image.new("RGB", (4, 4), (200, 100, 100)))["saturation"] == pytest.approx(0.5)


def test_a_step_has_two_columns_of_edges_and_one_bit():
    picture = np.zeros((10, 12, 3))
    picture[:, 6:] = 255
    values = image_statistics(image(picture))
    assert values["edge_density"] == pytest.approx(2 / 10)  # of the ten inner columns
    assert values["colour_entropy"] == pytest.approx(1.0)
    assert values["dark_fraction"] == 0.5
    # The Laplacian is +1 in one inner column, -1 in another and 0 in eight.
    assert values["sharpness"] == pytest.approx(np.sqrt(0.2))


def test_four_equal_colours_are_two_bits():
    picture = np.zeros((4, 4, 3))
    picture[:2, :2, 0] = picture[2:, :2, 1] = picture[:2, 2:, 2] = 255
    assert image_statistics(image(picture))["colour_entropy"] == pytest.approx(2.0)


def test_diversity_is_the_mean_distance_of_pairs():
    black, white, grey = (thumbnail(Image.new("RGB", (64, 40), (v, v, v))) for v in (0, 255, 51))
    assert diversity([black, white]) == 1.0
    assert diversity([black, white, grey]) == pytest.approx((1 + 0.2 + 0.8) / 3)
    assert diversities([black, white, grey], ["a", "a", "b"]) == {"a": 1.0}


def changes(name, base, aligned, count=40):
    random = np.random.default_rng(0)
    before = {name: (base + random.normal(0, 0.02 * base, count)).tolist()}
    after = {name: (aligned + random.normal(0, 0.02 * base, count)).tolist()}
    return statistic_changes(before, after, [f"p{i}" for i in range(count)], {}, {})[0]


@pytest.mark.parametrize(
    ("name", "base", "aligned", "flagged"),
    [
        ("edge_density", 0.2, 0.08, True),  # the reported case: -60 %
        ("edge_density", 0.2, 0.18, False),
        ("edge_density", 0.2, 0.5, False),
        ("colour_entropy", 4.0, 1.8, True),  # -54 %
        ("dark_fraction", 0.45, 0.93, True),
        ("dark_fraction", 0.01, 0.05, False),  # five times nothing
        ("saturation", 0.4, 0.7, True),
        ("saturation", 0.4, 0.2, True),
        ("sharpness", 0.1, 0.03, True),
    ],
)
def test_what_raises_the_flag(name, base, aligned, flagged):
    change = changes(name, base, aligned)
    assert change.flagged is flagged
    assert change.change.value == pytest.approx(aligned - base, abs=0.01 * base)


def test_collapsed_diversity_raises_the_flag():
    prompts = [f"p{i}" for i in range(10)]
    (change,) = statistic_changes({}, {}, prompts, dict.fromkeys(prompts, 0.3), dict.fromkeys(prompts, 0.1))
    assert change.name == "diversity" and change.flagged
    assert (change.base, change.aligned) == (pytest.approx(0.3), pytest.approx(0.1))
