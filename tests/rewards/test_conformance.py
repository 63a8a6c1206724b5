"""Every card of the registry goes through the conformance checks, and the checks can fail."""

import ast
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign import rewards
from diffalign.rewards.images import in_batches
from diffalign.rewards.registry import Place
from diffalign.rewards.zoo import step_aware
from diffalign.rewards.zoo.pickscore import PickScore
from diffalign.rewards.zoo.step_aware import from_clip
from diffalign.tiny import motions
from diffalign.tiny.worlds import PATTERNS, SCENES
from tests.rewards import conformance
from tests.rewards.conformance import conforms, conforms_to_samples, covers


@pytest.fixture(scope="session")
def specs(clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    generator = torch.Generator().manual_seed(0)
    torch.save(
        {"weight": torch.randn(1, 16, generator=generator), "bias": torch.tensor([5.0])}, folder / "v1.pth"
    )
    layers = [(0, 8, 16), (2, 6, 8), (4, 5, 6), (6, 4, 5), (7, 1, 4)]
    state = {f"layers.{i}.weight": torch.randn(o, n, generator=generator) / 2 for i, o, n in layers}
    state |= {f"layers.{i}.bias": torch.randn(o, generator=generator) for i, o, _ in layers}
    torch.save(state, folder / "v2.pth")
    (folder / "spm").mkdir()
    step_aware.save(from_clip(str(clip_folder), Place()), folder / "spm")
    return {
        "pickscore": f"pickscore:{clip_folder}",
        "aesthetic_v1": f"aesthetic_v1:{folder / 'v1.pth'}@{clip_folder}",
        "aesthetic_v2": f"aesthetic_v2:{folder / 'v2.pth'}@{clip_folder}",
        "step_aware": f"step_aware:{folder / 'spm'}",
    }


NAMES = ("pickscore", "aesthetic_v1", "aesthetic_v2", "step_aware")


@covers("pickscore", "aesthetic_v1", "aesthetic_v2", "step_aware")
@pytest.mark.parametrize("name", NAMES)
def test_it_conforms(specs, words, name):
    reward = rewards.load(specs[name])
    spread = reward(conformance.pictures(), [words[0]] * 6).std().item()
    conforms(reward, words, tolerance=spread / 10, differentiable=rewards.REGISTRY[name].differentiable)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_keeps_the_order(specs, words, name):
    conformance.assert_bfloat16_keeps_the_order(specs[name], words)


@covers("tiny_clip")
def test_the_tiny_clip_conforms():
    reward, prompts = rewards.load("tiny_clip"), ["a large red circle", "a small blue square"]
    spread = reward(conformance.pictures(), [prompts[0]] * 6).std().item()
    conforms(reward, prompts, tolerance=spread / 10, differentiable=True)


@covers("judge", "taste", "jpeg", "jpeg_incompressibility", "pattern_judge", "pattern_taste")
@pytest.mark.parametrize(
    ("name", "world"),
    [(name, SCENES) for name in ("judge", "taste", "jpeg", "jpeg_incompressibility")]
    + [(name, PATTERNS) for name in ("pattern_judge", "pattern_taste")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rules_on_drawn_scenes_conform(name, world):
    random = np.random.default_rng(0)
    captions = list(world.split_captions("test")[:6])
    drawn = [world.render(world.scene_of(caption, random)) for caption in captions]
    drawn[1], drawn[4] = drawn[0], drawn[3]  # of another caption: not everything holds
    conforms_to_samples(lambda size: rewards.load(name, batch_size=size), drawn, captions)


@covers("video_content", "video_motion", "video_dynamics")
@pytest.mark.parametrize("name", ["video_content", "video_motion", "video_dynamics"])
def test_rules_on_moving_shapes_conform(name):
    captions, clips = map(list, zip(*motions.clips("test", 6), strict=True))
    clips[1], clips[4] = clips[0], clips[3]
    conforms_to_samples(lambda size: rewards.load(name, batch_size=size), clips, captions)


def covered() -> set[str]:
    """Return the cards that tests are marked with, of the tests that do call a conformance check."""
    names: set[str] = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
            called = {getattr(func, "id", getattr(func, "attr", "")) for func in calls}
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "covers":
                    assert called & {"conforms", "conforms_to_samples"}, (file.name, node.name)
                    names |= {argument.value for argument in mark.args}
    return names


@pytest.mark.parametrize("name", rewards.REGISTRY)
def test_every_card_is_covered(name):
    assert name in covered(), f"no test takes {name!r} through tests/rewards/conformance.py"


@pytest.mark.parametrize("fault", ["none", "batch mean"])
def test_a_batch_mean_is_found_among_samples(fault):
    right = rewards.load("jpeg")

    def faulty(images, prompts):
        scores = right(images, prompts)
        return scores - scores.mean() if fault == "batch mean" and len(scores) else scores

    samples, prompts = conformance.pictures(), ["a"] * 6
    if fault == "none":
        conforms_to_samples(lambda size: faulty, samples, prompts)
    else:
        with pytest.raises(AssertionError):
            conforms_to_samples(lambda size: faulty, samples, prompts)


@dataclass(frozen=True)
class Faulty:
    """PickScore with a fault."""

    right: PickScore
    fault: str
    batch_size: int = 16

    def __call__(self, images, prompts):
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images, prompts):
        if self.fault == "not antialiased" and isinstance(images, torch.Tensor):
            images = images[:, :, ::2, ::2]
        scores = self.right(images, prompts)
        if self.fault == "half a gradient":
            return (scores + scores.detach()) / 2
        return scores - scores.mean() if self.fault == "batch mean" else scores


@pytest.mark.parametrize(
    ("fault", "piece"),
    [
        ("batch mean", conformance.assert_a_batch_is_its_images_one_by_one),
        ("batch mean", conformance.assert_sub_batches_do_not_matter),
        ("not antialiased", lambda r, p: conformance.assert_pixels_score_as_their_image(r, p, 0.5)),
        ("batch mean", conformance.assert_gradients_are_right),
        ("half a gradient", conformance.assert_gradients_are_right),
    ],
)
def test_a_fault_is_found(specs, words, fault, piece):
    right = rewards.load(specs["pickscore"])
    piece(Faulty(right, "none"), words)
    with pytest.raises(AssertionError):
        piece(Faulty(right, fault), words)
