"""Edits of drawn scenes: instructions and captions agree, and scores tell right results from wrong ones."""

from dataclasses import replace

import numpy as np
import pytest

from diffalign.tiny import edits
from diffalign.tiny.edits import Edit
from diffalign.tiny.scenes import Scene, Thing, caption, render, split_of

LAYOUT = (0.5,) * 8
RED, BLUE = Thing("small", "red", "circle"), Thing("large", "blue", "square")
BEFORE = Scene((RED, BLUE), "to the left of", LAYOUT)


def edit_of(**words: str) -> Edit:
    """Return an edit of the small red circle."""
    ((kind, value),) = words.items()
    target = replace(BEFORE, things=(replace(RED, **words), BLUE))
    return Edit(BEFORE, edits.instruction(RED, kind, value), target)


def scores(scene: Scene, edit: Edit) -> tuple[float, float, float]:
    image = render(scene)
    return (
        edits.right(image, caption(edit.source), edit.instruction),
        edits.followed(image, edit),
        edits.untouched(image, edit),
    )


@pytest.mark.parametrize("kinds", [edits.KINDS, ("color",), ("shape",)])
def test_an_instruction_turns_the_source_into_the_target_within_a_split(kinds: tuple[str, ...]) -> None:
    for edit in edits.held_out(40, "test", kinds=kinds):
        assert edits.edited(caption(edit.source), edit.instruction) == caption(edit.target)
        assert {split_of(caption(scene)) for scene in (edit.source, edit.target)} == {"test"}
        assert ("color" in kinds and edit.instruction.startswith("make")) or (
            "shape" in kinds and edit.instruction.startswith("turn")
        )


@pytest.mark.parametrize("words", [{"color": "pink"}, {"shape": "triangle"}])
def test_scores_tell_which_thing_was_changed(words: dict[str, str]) -> None:
    edit = edit_of(**words)
    assert scores(edit.target, edit) == (1.0, 1.0, 1.0)
    assert scores(edit.source, edit) == (7 / 8, 0.0, 1.0)
    other = replace(BEFORE, things=(RED, replace(BLUE, **words)))
    assert scores(other, edit) == (6 / 8, 0.0, 0.0)
    alone = Scene(BEFORE.things[1:], None, LAYOUT)
    assert scores(alone, edit)[1:] == (0.0, 0.0)  # in the middle, where neither was


def test_pixels_outside_the_edit_count_as_kept() -> None:
    edit = edit_of(color="pink")
    assert edits.kept(render(edit.target), edit) > 0.999
    assert edits.kept(render(replace(edit.target, dark=True)), edit) < 0.4


def test_a_scene_of_one_thing_has_none_that_stays() -> None:
    source = Scene((RED,), None, LAYOUT)
    target = replace(source, things=(replace(RED, color="pink"),))
    with pytest.raises(ValueError, match="'a small red circle' has no thing beside the edited one"):
        edits.untouched(render(target), Edit(source, "make the small red circle pink", target))


def test_a_mistake_is_of_its_kinds_and_never_the_target() -> None:
    rng = np.random.default_rng(0)
    for edit in edits.held_out(30, "train", kinds=("color",)):
        wrong = edits.mistaken(edit, rng, ("color",))
        assert wrong != edit.target
        assert [t.shape for t in wrong.things] == [t.shape for t in edit.source.things]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("paint the small red circle pink", "is not an instruction"),
        ("make the small red circle round", "is not an instruction"),
        ("make the small green circle pink", "is about no thing"),
    ],
)
def test_what_is_no_instruction_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        edits.edited(caption(BEFORE), text)
