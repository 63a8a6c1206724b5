"""The judges: high scores for correct renders, low for wrong ones, 0 for images without content."""

import numpy as np
import pytest
from PIL import Image

from diffalign.tiny.judge import judge, taste
from diffalign.tiny.scenes import caption, render, sample_scene, scene_of
from diffalign.tiny_build.report import judges, nonsense


def test_statements_of_true_renders_hold_and_wrong_words_cost():
    figures = judges(seed=5, count=300)
    assert figures["statements_right"] >= 0.99
    assert 0.8 <= figures["one_word_wrong"] <= 0.9  # an eighth or a quarter less
    assert figures["another_caption"] < 0.5
    assert figures["taste_vivid"] > 0.95 and figures["taste_washed_out"] < 0.05


def test_pictures_of_nothing_score_nothing():
    text = "a large red circle above a small blue square"
    scores = [judge(junk, text) for seed in range(100) for junk in nonsense(seed)]
    assert np.mean(scores) < 0.005
    assert max(taste(junk) for seed in range(100) for junk in nonsense(seed)[:3]) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        "a small red circle above a small blue square",
        "a large green circle above a small blue square",
        "a large red triangle above a small blue square",
        "a large red circle below a small blue square",
        "a large red circle above a large blue square",
    ],
)
def test_one_wrong_word_loses_one_statement_of_eight(wrong):
    image = render(scene_of("a large red circle above a small blue square", np.random.default_rng(0)))
    assert judge(image, "a large red circle above a small blue square") == 1
    assert judge(image, wrong) == 7 / 8


def test_a_third_thing_and_a_missing_thing_cost_the_count():
    pair = render(scene_of("a small red circle above a small blue square", np.random.default_rng(1)))
    alone = render(scene_of("a small red circle", np.random.default_rng(1)))
    assert judge(pair, "a small red circle") == 3 / 4
    assert judge(alone, "a small red circle above a small blue square") == 3 / 8


def test_swapped_things_are_seen_by_their_relation():
    image = render(scene_of("a small red circle above a small red circle", np.random.default_rng(2)))
    assert judge(image, "a small red circle below a small red circle") == 1  # either circle may be the first
    image = render(scene_of("a small red circle above a large blue square", np.random.default_rng(2)))
    assert judge(image, "a large blue square below a small red circle") == 1
    assert judge(image, "a large blue square above a small red circle") == 7 / 8


def test_arrays_and_other_sizes_are_judged_alike():
    scene = sample_scene(np.random.default_rng(4))
    image, text = render(scene), caption(scene)
    array = np.asarray(image)
    assert judge(image, text) == judge(array, text) == judge(array / 255.0, text) == 1
    assert judge(image.resize((128, 128), Image.Resampling.BICUBIC), text) == 1
    assert taste(image) == taste(array)


def test_bad_inputs_name_the_value():
    with pytest.raises(ValueError, match=r"got \(32, 32\)"):
        judge(np.zeros((32, 32)), "a small red circle")
    with pytest.raises(ValueError, match="'a dog' is not a scene caption"):
        judge(np.zeros((32, 32, 3)), "a dog")
