"""Requirements of every reward with a network: ``conforms(reward, prompts, ...)`` and its parts.

A reward is one made of a tiny random checkpoint: a frozen dataclass with the field ``batch_size``. Every
piece raises AssertionError. Scores must tell the images apart, else a comparison says nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign import rewards

SIZES = ((40, 30), (28, 28), (64, 64), (31, 90), (56, 33), (33, 28))  # width, height
MODES = ("RGB", "RGB", "RGBA", "RGB", "RGB", "L")


def pictures(count: int = 6, seed: int = 0) -> list[Image.Image]:
    """Random patches under a fine grain, in several sizes and modes: scores differ, and so they do without
    antialiasing.
    """
    random = np.random.default_rng(seed)
    images = []
    for i in range(count):
        cells = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        patches = np.asarray(Image.fromarray(cells).resize(SIZES[i % len(SIZES)], Image.Resampling.BICUBIC))
        grain = random.integers(-40, 41, patches.shape)
        image = Image.fromarray((patches + grain).clip(0, 255).astype(np.uint8))
        images.append(image.convert(MODES[i % len(MODES)]))
    return images


def as_pixels(image: Image.Image) -> Tensor:
    """(1, 3, H, W) float32 in [0, 1]: an 8-bit image as a tensor."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def some(prompts: Sequence[str], count: int) -> list[str]:
    """``count`` prompts, those given and again from the first."""
    return [prompts[i % len(prompts)] for i in range(count)]


def rounding(scores: Tensor) -> float:
    """Return the tolerance for float32 rounding of such scores between batches."""
    return 2e-5 * max(1.0, scores.abs().max().item())


def conforms(reward: Any, prompts: Sequence[str], *, tolerance: float, differentiable: bool) -> None:
    """All pieces that need nothing but the reward.

    ``tolerance`` is how far the score of an image may be from that of its pixels as a tensor, in the units of
    the score; ``differentiable`` is what the card says. ``prompts`` are one or more that the reward can read.
    """
    assert_shapes(reward, prompts)
    assert_a_batch_is_its_images_one_by_one(reward, prompts)
    assert_order_does_not_matter(reward, prompts)
    assert_sub_batches_do_not_matter(reward, prompts)
    assert_pixels_score_as_their_image(reward, prompts, tolerance)
    if differentiable:
        assert_gradients_are_right(reward, prompts)


def covers(*names: str) -> Callable[[Any], Any]:
    """Mark a test that takes the rewards of these cards through ``conforms`` or ``conforms_to_samples``;
    ``test_every_card_is_covered`` holds the marks against the registry.
    """
    return lambda test: test


def conforms_to_samples(
    reward_of: Callable[[int], Any], samples: Sequence[Any], prompts: Sequence[str]
) -> None:
    """Check rewards with samples of their own: videos, drawn scenes, texts in images.

    ``reward_of`` gives the reward at a batch size; ``prompts`` are as many as ``samples``, three or more.
    Scores are (B,) float32, finite and without a graph; a batch scores as its samples one by one, in any
    order and at any batch size; and they tell some samples apart.
    """
    samples, prompts, count = list(samples), list(prompts), len(samples)
    together = reward_of(count)(samples, prompts)
    assert together.shape == (count,) and together.dtype == torch.float32, (together.shape, together.dtype)
    assert together.isfinite().all() and not together.requires_grad
    assert reward_of(count)([], []).shape == (0,)
    assert together.std() > 10 * rounding(together), f"the samples all score alike: {together.tolist()}"
    close = {"rtol": 0, "atol": rounding(together)}
    alone = torch.cat([reward_of(count)(samples[i : i + 1], prompts[i : i + 1]) for i in range(count)])
    torch.testing.assert_close(together, alone, **close)
    order = [*range(1, count, 2), *range(0, count, 2)][::-1]
    turned = reward_of(count)([samples[i] for i in order], [prompts[i] for i in order])
    torch.testing.assert_close(turned, together[order], **close)
    for size in (1, 2):
        torch.testing.assert_close(reward_of(size)(samples, prompts), together, **close)


def assert_shapes(reward: Any, prompts: Sequence[str]) -> None:
    """(B,) float32 for 0, 1 and 3 images, as PIL images and as pixels, without a gradient graph from PIL."""
    images = pictures(3)
    pixels = torch.cat([as_pixels(image.resize((40, 36))) for image in images])
    for count in (0, 1, 3):
        for given in (images[:count], pixels[:count]):
            scores = reward(given, some(prompts, count))
            assert scores.shape == (count,) and scores.dtype == torch.float32, (scores.shape, scores.dtype)
            assert scores.isfinite().all() and not scores.requires_grad


def assert_a_batch_is_its_images_one_by_one(reward: Any, prompts: Sequence[str]) -> None:
    """Images of mixed sizes, and pixels of one size, score in a batch as they do alone."""
    images = pictures()
    words = some(prompts, len(images))
    pixels = torch.cat([as_pixels(image.resize((40, 36))) for image in images])
    for given in (images, pixels):
        together = replace(reward, batch_size=len(images))(given, words)
        alone = torch.cat([reward(given[i : i + 1], words[i : i + 1]) for i in range(len(images))])
        assert together.std() > 10 * rounding(together), f"the images all score alike: {together.tolist()}"
        torch.testing.assert_close(together, alone, rtol=0, atol=rounding(together))


def assert_order_does_not_matter(reward: Any, prompts: Sequence[str]) -> None:
    """Images and prompts in another order give the scores in that order."""
    images, order = pictures(), [3, 1, 5, 0, 4, 2]
    words = some(prompts, len(images))
    scores = reward(images, words)
    turned = reward([images[i] for i in order], [words[i] for i in order])
    torch.testing.assert_close(turned, scores[order], rtol=0, atol=rounding(scores))


def assert_sub_batches_do_not_matter(reward: Any, prompts: Sequence[str]) -> None:
    """One image at a time, four (which does not divide six) and sixteen."""
    images = pictures()
    words = some(prompts, len(images))
    scores = replace(reward, batch_size=16)(images, words)
    for size in (1, 4):
        smaller = replace(reward, batch_size=size)(images, words)
        torch.testing.assert_close(smaller, scores, rtol=0, atol=rounding(scores))


def assert_pixels_score_as_their_image(reward: Any, prompts: Sequence[str], tolerance: float) -> None:
    """Check the differentiable path: within ``tolerance`` of the exact one, less than images differ."""
    images = pictures()
    words = some(prompts, len(images))
    exact = reward(images, words)
    assert tolerance < exact.std(), f"{tolerance} says nothing of scores that differ by {exact.std()}"
    pixels = torch.cat([reward(as_pixels(i), [w]) for i, w in zip(images, words, strict=True)])
    torch.testing.assert_close(pixels, exact, rtol=0, atol=tolerance)


def assert_gradients_are_right(reward: Any, prompts: Sequence[str], step: float = 1 / 32) -> None:
    """Check the largest derivative by one pixel against central differences; other images have none.

    Scores are float32, so the step is large, and four points cancel the error that a large step makes. The
    pixels are grey enough that nothing is clamped.
    """
    pixels = torch.cat([as_pixels(image.resize((40, 36))) for image in pictures(2)]) / 2 + 0.25
    words = some(prompts, 2)
    pixels.requires_grad_()
    score = reward(pixels, words)[0]
    (gradient,) = torch.autograd.grad(score, pixels)
    assert not gradient[1].any(), "a score depends on its neighbour's pixels"
    where = np.unravel_index(int(gradient[0].abs().argmax()), gradient[0].shape)
    slope = gradient[0][where].item()

    def at(change: float) -> float:
        moved = pixels.detach()[:1].clone()
        moved[0][where] += change
        return reward(moved, words[:1]).item()

    found = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    noise = 4e-7 * max(abs(score.item()), 0.1) / step
    assert abs(slope) > 20 * noise, f"the derivative {slope} drowns in rounding {noise}"
    assert abs(found - slope) < 0.02 * abs(slope) + noise, f"differences say {found}, autograd {slope}"


def assert_bfloat16_keeps_the_order(spec: str, prompts: Sequence[str], correlation: float = 0.98) -> None:
    """Check that a reward loaded in bfloat16 gives float32 scores that rank images as float32 does."""
    images = pictures(12)
    words = some(prompts[:1], len(images))
    exact, rough = (rewards.load(spec, dtype=dtype)(images, words) for dtype in ("float32", "bfloat16"))
    assert rough.dtype == torch.float32
    ranks = torch.stack([exact.argsort().argsort(), rough.argsort().argsort()]).float()
    found = torch.corrcoef(ranks)[0, 1].item()
    assert found >= correlation, f"rank correlation {found}"
