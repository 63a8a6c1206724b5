"""The rewards of CLIPs that need a checkpoint keep to what all rewards keep to; and the check can fail."""

from dataclasses import dataclass

import pytest
import torch

from diffalign import rewards
from diffalign.rewards.images import in_batches
from diffalign.rewards.registry import Place
from diffalign.rewards.zoo import step_aware
from diffalign.rewards.zoo.pickscore import PickScore
from diffalign.rewards.zoo.step_aware import from_clip
from tests.rewards import conformance
from tests.rewards.conformance import conforms


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


@pytest.mark.parametrize("name", NAMES)
def test_it_conforms(specs, words, name):
    reward = rewards.load(specs[name])
    spread = reward(conformance.pictures(), [words[0]] * 6).std().item()
    conforms(reward, words, tolerance=spread / 10, differentiable=rewards.REGISTRY[name].differentiable)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_keeps_the_order(specs, words, name):
    conformance.assert_bfloat16_keeps_the_order(specs[name], words)


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
