"""Scenes: captions and statements agree, splits are disjoint and fixed, things stay inside the image."""

import numpy as np
import pytest

from diffalign import tiny
from diffalign.tiny.scenes import (
    SIDE,
    SPLITS,
    alter,
    caption,
    parse,
    place,
    render,
    sample_scene,
    scene_of,
    split_captions,
    split_of,
)


def test_a_caption_parses_back_to_its_things():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng)
        statements = parse(caption(scene))
        assert len(statements) == (4 if scene.relation is None else 8)
        assert statements[0].value == str(len(scene.things))
        words = [s.value for s in statements if s.kind == "color"]
        assert words == [t.color for t in scene.things]


@pytest.mark.parametrize(
    "text", ["", "a photo of a cat", "a large red", "a large red house", "a large mauve circle"]
)
def test_another_prompt_is_an_error_that_names_it(text):
    with pytest.raises(ValueError, match="is not a scene caption") as error:
        parse(text)
    assert repr(text) in str(error.value)


def test_things_keep_their_distance_from_each_other_and_the_border():
    rng = np.random.default_rng(1)
    for _ in range(500):
        scene = sample_scene(rng)
        spots = place(scene)
        assert all(3.5 < x < SIDE - 3.5 and 3.5 < y < SIDE - 3.5 for x, y, _ in spots)
        if len(spots) == 2:
            (ax, ay, _), (bx, by, _) = spots
            assert max(abs(ax - bx), abs(ay - by)) > 8


def test_rendering_is_a_function_of_the_scene():
    scene = sample_scene(np.random.default_rng(2))
    assert render(scene).size == (SIDE, SIDE)
    assert render(scene).tobytes() == render(scene).tobytes()


def test_altering_changes_exactly_one_word_and_no_style():
    rng = np.random.default_rng(3)
    for _ in range(100):
        scene = scene_of("a large red circle above a small blue square", rng)
        other = alter(scene, rng)
        assert (other.vivid, other.dark, other.layout) == (scene.vivid, scene.dark, scene.layout)
        pairs = zip(parse(caption(scene)), parse(caption(other)), strict=True)
        assert sum(a != b for a, b in pairs) == 1
    with pytest.raises(ValueError, match="kind must be one of"):
        alter(scene_of("a large red circle", rng), rng, "relation")


def test_splits_are_disjoint_large_enough_and_fixed():
    sets = {name: tiny.prompts(name) for name in SPLITS}
    assert all(len(set(p)) == len(p) for p in sets.values())
    assert sum(map(len, sets.values())) == len(set().union(*sets.values())) == 5220
    assert len(sets["test"]) >= 1024 and len(sets["validation"]) >= 512
    assert tiny.prompts("test", 5) == sets["test"][:5] == list(split_captions("test")[:5])
    assert split_of(sets["test"][0]) == "test"


def test_unknown_splits_families_and_counts_name_what_is_allowed():
    with pytest.raises(ValueError, match="'train', 'validation', 'test'"):
        tiny.prompts("dev")
    with pytest.raises(ValueError, match="n must be from 0 to"):
        tiny.prompts("test", 10**6)
    with pytest.raises(ValueError, match=r"'sdxl', 'sd15'.*'flux'"):
        tiny.pipeline_path("flux")
