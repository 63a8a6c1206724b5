"""Rewards by their Python import path: the three forms, what is refused, and that parsing finds them."""

import sys

import pytest
import torch
from PIL import Image

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.registry import parse, usual_range

MODULE = '''
"""A user's own rewards."""
import numpy as np


def red(images, prompts):
    """How red the images are."""
    return [float(np.asarray(image.convert("RGB"))[..., 0].mean()) for image in images]


class Green:
    low, high = 0, 255

    def __init__(self, device="cpu", batch_size=1):
        self.settings = device, batch_size

    def __call__(self, images, prompts):
        assert len(images) <= self.settings[1]
        return np.array([np.asarray(image.convert("RGB"))[..., 1].mean() for image in images])


def make():
    return red


blue = Green(batch_size=64)


class Needy:
    def __init__(self, path):
        pass


def one(images, prompts):
    return 1.0


def words(images, prompts):
    return ["good" for _ in images]


number = 3
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import no_such_package_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_rewards", None)


IMAGES = [Image.new("RGB", (4, 4), (level, 2 * level, 0)) for level in (10, 20, 30)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("red", [10, 20, 30]), ("make", [10, 20, 30]), ("Green", [20, 40, 60]), ("blue", [20, 40, 60])],
)
def test_each_form_scores(module, name, expected):
    reward = rewards.load(f"own_rewards:{name}", batch_size=2)
    scores = reward(IMAGES, ["a", "b", "c"])
    assert scores.dtype == torch.float32 and scores.tolist() == expected
    assert reward([], []).shape == (0,)


def test_the_card_comes_from_the_object(module):
    card, source = parse("own_rewards:red")
    assert (card.name, source, card.cached, card.video) == ("red", "own_rewards:red", False, False)
    assert card.title == "How red the images are." and usual_range("own_rewards:red") is None
    assert usual_range("own_rewards:Green") == (0, 255)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_rewards:Needy", "needs path"),
        ("own_rewards:absent", "no class or function 'absent'; it has red"),
        ("own_rewards:number", "no class or function 'number'"),
        ("broken_rewards:any", "cannot be imported: ModuleNotFoundError"),
        ("no_module_of_this_name:reward", "reward is 'no_module_of_this_name'|no_module_of_this_name"),
    ],
)
def test_what_is_refused_names_the_spec(module, spec, message):
    with pytest.raises(UserError, match=message):
        rewards.load(spec)


@pytest.mark.parametrize(
    ("name", "message"), [("one", r"shape \(\) for 3 images"), ("words", "allowed: numbers")]
)
def test_an_answer_of_another_kind_is_refused(module, name, message):
    with pytest.raises(UserError, match=message):
        rewards.load(f"own_rewards:{name}")(IMAGES, ["a"] * 3)


def test_a_cosine_states_its_range_at_its_scale():
    assert usual_range("pickscore") == (17, 24)
    assert usual_range("pickscore:scale=1") == pytest.approx((0.17, 0.24))
    assert usual_range("clipscore:/models/clip@scale=2.5@clamp=yes") == pytest.approx((0.375, 0.875))
    assert usual_range("latent_reward:sd15") is None
