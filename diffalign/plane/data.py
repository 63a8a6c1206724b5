"""Training data on the plane: pairs, ranked lists, single likes, demonstrations, captions.

All makers have the signature ``(plane, base, count, seed, flipped) -> Batch`` and return ``count`` groups of
equal size with contiguous members. ``flipped`` reverses every label, and the rewards in ``extra``: a control,
which must lower the measured quantity. ``negative`` is label 0, "anywhere", for guidance.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.diffusion.samplers import sample
from diffalign.plane.plane import LABELS, Plane
from diffalign.types import Batch, Denoiser

Maker = Callable[..., Batch[Tensor]]
"""(plane, base, count, seed, flipped) -> Batch; every argument but the first two has a default."""

TEMPERATURE = 0.3  # Bradley-Terry: P(a over b) = sigmoid((height(a) - height(b)) / 0.3)
RIVALS = 4  # members of a ranked list
BEST = 0.1  # share of the data that counts as demonstrations
FRAMES = 4  # frames of a film


def preferences(
    plane: Plane, base: Denoiser, count: int = 4096, seed: int = 0, flipped: bool = False
) -> Batch[Tensor]:
    """Sample pairs from the base and label them 1 and 0 by Bradley-Terry on the height.

    ``extra["reward"]`` is the height.
    """
    g = torch.Generator().manual_seed(seed)
    label, x = _drawn(base, count, 2, g)
    height = plane.reward(x).reshape(count, 2)
    first = torch.rand(count, generator=g) < torch.sigmoid((height[:, 0] - height[:, 1]) / TEMPERATURE)
    first = first ^ flipped
    score = torch.stack([first, ~first], 1).float().flatten()
    return _batch(x, label, 2, score, {"reward": _signed(height.flatten(), flipped)})


def lists(
    plane: Plane, base: Denoiser, count: int = 2048, seed: int = 0, flipped: bool = False
) -> Batch[Tensor]:
    """Sample groups of four from the base, scored by their heights (also in ``extra["reward"]``)."""
    g = torch.Generator().manual_seed(seed)
    label, x = _drawn(base, count, RIVALS, g)
    height = _signed(plane.reward(x), flipped)
    return _batch(x, label, RIVALS, height, {"reward": height})


def films(
    plane: Plane, base: Denoiser, count: int = 1024, seed: int = 0, flipped: bool = False
) -> Batch[Tensor]:
    """Sample pairs of films, x (B, 2, 4, 1, 1): four independent points of the base under one label.

    Every frame is labelled as in ``preferences``: score (B, 4).
    """
    g = torch.Generator().manual_seed(seed)
    label, x = _drawn(base, count, 2 * FRAMES, g)
    height = plane.reward(x).reshape(count, 2, FRAMES)
    chance = torch.sigmoid((height[:, 0] - height[:, 1]) / TEMPERATURE)
    first = (torch.rand(count, FRAMES, generator=g) < chance) ^ flipped
    score = torch.stack([first, ~first], 1).float().flatten(0, 1)
    frames = x.reshape(2 * count, FRAMES, 2).transpose(1, 2)[..., None, None]
    return _batch(frames, label[::FRAMES], 2, score, {})


def likes(
    plane: Plane, base: Denoiser, count: int = 4096, seed: int = 0, flipped: bool = False
) -> Batch[Tensor]:
    """Sample single points from the base, liked (1) with probability sigmoid(height / 0.3), else not (0).

    Each is a group of its own. The mean height is 0.
    """
    g = torch.Generator().manual_seed(seed)
    label, x = _drawn(base, count, 1, g)
    height = plane.reward(x)
    liked = (torch.rand(count, generator=g) < torch.sigmoid(height / TEMPERATURE)) ^ flipped
    return _batch(x, label, 1, liked.float(), {"reward": _signed(height, flipped)})


def experts(
    plane: Plane, base: Denoiser, count: int = 2048, seed: int = 0, flipped: bool = False
) -> Batch[Tensor]:
    """Return demonstrations: the best tenth of the data of each label (the worst if ``flipped``).

    Each is a group of its own with score 1. The base is not used.
    """
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % LABELS
    best = []
    for i in range(LABELS):
        size = int((label == i).sum())
        x = plane.data(i).points(round(size / BEST), g)
        best.append(x[_signed(plane.reward(x), flipped).topk(size).indices])
    x = torch.stack([best[int(i)][n // LABELS] for n, i in enumerate(label)])
    return _batch(x, label, 1, torch.ones(count), {"reward": _signed(plane.reward(x), flipped)})


def captions(
    plane: Plane, base: Denoiser, count: int = 4096, seed: int = 0, flipped: bool = False
) -> Batch[Tensor]:
    """Return points of the data, each twice: with its label, "left" or "right" (1), and with the other (0).

    The base is not used.
    """
    g = torch.Generator().manual_seed(seed)
    right = torch.randint(1, LABELS, (count,), generator=g)
    x = torch.stack([plane.data(i).points(count, g) for i in (1, 2)])[right - 1, torch.arange(count)]
    label = torch.stack([right, 3 - right], 1).flatten()
    score = torch.tensor([0.0, 1.0] if flipped else [1.0, 0.0]).repeat(count)
    return _batch(x.repeat_interleave(2, 0), label, 2, score, {})


def patched(
    plane: Plane, base: Denoiser, count: int = 4096, seed: int = 0, flipped: bool = False
) -> Batch[Tensor]:
    """Return the pairs of ``preferences`` with one-patch weight maps: 0.9 for the better, else 0.1."""
    batch = preferences(plane, base, count, seed, flipped)
    return replace(batch, extra={**batch.extra, "patches": torch.full((len(batch.x), 1), 0.1)})


def with_flipped_labels(batch: Batch[Tensor], share: float, seed: int) -> Batch[Tensor]:
    """Return pairs with a random share of the labels flipped; rewards are unchanged."""
    wrong = torch.rand(batch.num_groups, generator=torch.Generator().manual_seed(seed)) < share
    return replace(batch, score=torch.where(wrong[batch.group], 1 - batch.score, batch.score))


def _drawn(base: Denoiser, count: int, size: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw labels (count * size,), equal within a group, and samples of the base (count * size, 2)."""
    label = torch.randint(LABELS, (count,), generator=g).repeat_interleave(size)
    return label, sample(base, torch.randn(len(label), 2, generator=g), {"label": label}, g)


def _signed(height: Tensor, flipped: bool) -> Tensor:
    return -height if flipped else height


def _batch(x: Tensor, label: Tensor, size: int, score: Tensor, extra: dict[str, Tensor]) -> Batch[Tensor]:
    group = torch.arange(len(x) // size).repeat_interleave(size)
    return Batch(x, {"label": label}, group, score, {"label": torch.zeros_like(label)}, extra)
