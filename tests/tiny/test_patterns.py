"""The patterned scenes: captions, the renderer, the judges, splits and sets."""

import io

import numpy as np
import pytest
from PIL import Image

from diffalign import tiny
from diffalign.errors import UserError
from diffalign.rewards import load
from diffalign.tiny import pattern_judge, patterns, sets
from diffalign.tiny.pattern_judge import judge, taste
from diffalign.tiny.patterns import Figure, caption, parse, picture_of, render, sample_picture, split_of
from diffalign.tiny.worlds import PATTERNS, SCENES
from diffalign.tiny_build import corpus
from diffalign.tiny_build.report import judges, nonsense

TEXT = (
    "a striped red circle to the left of a solid blue bar and above a hollow green diamond "
    "on a grey background"
)


def drawn(text=TEXT, seed=0, **more):
    return render(picture_of(text, np.random.default_rng(seed), **more))


def test_statements_of_true_renders_hold_and_wrong_words_cost():
    figures = judges(seed=5, count=200, world=PATTERNS)
    assert figures["statements_right"] == 1
    assert 0.85 <= figures["one_word_wrong"] <= 0.93
    assert figures["another_caption"] < 0.45
    assert figures["taste_lit"] == 1 and figures["taste_flat"] == 0
    assert figures["blank_noise_stripes"] < 0.01


def test_pictures_of_nothing_score_nothing():
    for blank in (np.zeros((64, 64, 3)), np.ones((64, 64, 3)), np.full((32, 32, 3), 0.5)):
        assert judge(blank, TEXT) == taste(blank) == 0
    assert max(taste(junk) for seed in range(20) for junk in nonsense(seed)) == 0


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("striped red", "solid red"),
        ("red", "orange"),
        ("circle", "diamond"),
        ("to the left of", "to the right of"),
        ("above", "below"),
        ("hollow green", "striped green"),
        ("grey background", "white background"),
    ],
)
def test_one_wrong_word_loses_one_statement_of_thirteen(right, wrong):
    assert judge(drawn(), TEXT) == 1
    assert judge(drawn(), TEXT.replace(right, wrong)) == pytest.approx(12 / 13)


def test_a_missing_and_a_further_shape_cost_the_count():
    alone, two = (
        "a solid red bar on a black background",
        "a solid red bar above a hollow blue square on a black background",
    )
    assert judge(drawn(alone), alone) == 1
    assert judge(drawn(two), alone) == 4 / 5  # of count, fill, colour, shape, background
    assert judge(drawn(alone), two) == 4 / 9


def test_an_equivalent_caption_is_judged_alike_and_lies_in_the_same_split():
    one = "a solid red bar above a hollow blue square on a black background"
    other = "a hollow blue square below a solid red bar on a black background"
    assert patterns.same(one, other) and judge(drawn(one), other) == 1
    rng = np.random.default_rng(0)
    for _ in range(50):
        picture = sample_picture(rng, "test")
        if len(picture.figures) == 3:
            a, b, c = picture.figures
            swapped = caption(patterns.Picture((a, c, b), picture.relations[::-1], picture.ground, ()))
        else:
            inverse = {r: next(s for s in patterns.RELATIONS if np.allclose(np.negative(patterns.RELATIONS[r]), patterns.RELATIONS[s])) for r in patterns.RELATIONS}  # noqa: E501 # fmt: skip
            relation = (inverse[picture.relations[0]],)
            swapped = caption(patterns.Picture(picture.figures[::-1], relation, picture.ground, ()))
        assert swapped != caption(picture) and split_of(swapped) == "test"


def test_captions_are_read_as_they_are_written():
    rng = np.random.default_rng(1)
    for _ in range(100):
        picture = sample_picture(rng)
        told = parse(caption(picture))
        assert (told.figures, told.relations, told.ground) == (
            picture.figures,
            picture.relations,
            picture.ground,
        )
    assert parse("A solid red bar on a white background.").figures == (Figure("solid", "red", "bar"),)


@pytest.mark.parametrize(
    "text",
    [
        "a large red circle",
        "a solid mauve circle on a grey background",
        "a solid red circle on a green background",
        "a solid red circle above a solid red bar and below a solid red square on a grey background",
    ],
)
def test_other_captions_are_refused_by_name(text):
    with pytest.raises(ValueError, match=text):
        parse(text)
    with pytest.raises(UserError, match="patterned scenes"):
        load("pattern_judge")([drawn()], [text])


def test_nothing_touches_another_shape_or_the_border():
    rng = np.random.default_rng(2)
    for _ in range(150):
        picture = sample_picture(rng)
        boxes = [
            (x - r * w, y - r * h, x + r * w, y + r * h)
            for (x, y, r), (w, h) in zip(
                patterns.place(picture), (patterns.SHAPES[f.shape] for f in picture.figures), strict=True
            )
        ]
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert min(left, top) >= 1.9 and max(right, bottom) <= patterns.SIDE - 1.9
            for others in boxes[:i]:
                apart = max(left - others[2], others[0] - right, top - others[3], others[1] - bottom)
                assert apart >= 2.9, caption(picture)


def test_light_is_seen_and_never_said():
    lit, flat = drawn(lit=True), drawn(lit=False)
    assert judge(lit, TEXT) == judge(flat, TEXT) == 1
    assert (taste(lit), taste(flat)) == (1, 0)
    view = pattern_judge.look(lit)
    assert view is not None and view.light == pytest.approx(1, abs=0.05)


def test_splits_are_disjoint_and_lists_are_prefixes_of_fixed_lists():
    every = {split: tiny.pattern_prompts(split) for split in patterns.SPLITS}
    assert {split: len(texts) for split, texts in every.items()} == patterns.SIZES_OF_SPLITS
    for split, texts in every.items():
        assert len(set(texts)) == len(texts)
        assert {split_of(t) for t in texts[:300]} == {split}
        assert tiny.pattern_prompts(split, 5) == texts[:5]
    assert not set(every["train"]) & {*every["validation"], *every["test"]}
    with pytest.raises(ValueError, match="split must be one of"):
        patterns.split_captions("dev")
    with pytest.raises(ValueError, match="n must be from 0 to 2048"):
        tiny.pattern_prompts("test", 2049)


def test_of_a_pair_the_better_image_shows_the_caption_and_both_have_one_light():
    places = []
    for row in sets.rows("pattern_pairs", 80):
        images = [Image.open(io.BytesIO(data)) for data in row["images"]]
        scores = [judge(image, row["prompt"]) for image in images]
        best = int(np.argmax(row["scores"]))
        assert scores[best] == 1 and scores[1 - best] < 1
        assert taste(images[0]) == taste(images[1])
        places.append(best)
    assert 20 < sum(places) < 60  # the better one has no place of its own


@pytest.mark.parametrize("world", [SCENES, PATTERNS], ids=["scenes", "patterns"])
def test_the_corpus_has_wrong_words_but_no_held_out_caption(world):
    data = corpus.make(120, 0, world=world)
    assert data.pixels.shape == (120, world.side, world.side, 3)
    assert {world.split_of(text) for text in data.captions} == {"train"}
    wrong = np.mean([a != b for a, b in zip(data.captions, data.truths, strict=True)])
    assert 0.25 < wrong < 0.85
    assert (data.time_ids[:, 4:] == world.side).all()
