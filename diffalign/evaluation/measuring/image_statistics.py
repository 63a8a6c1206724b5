"""Statistics of the pixels, independent of rewards, which detect over-optimisation.

A hacked reward continues to rise while the images get worse: edges vanish, colours become few or too
saturated, images turn dark, all images of a prompt look the same. In a reported case an OCR reward rose while
edge density fell by 60 %, colour entropy by 54 % and dark pixels went from 0.45 to 0.93
(Tencent-Hunyuan/UniRL issue 407). No reward is used here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image

from diffalign.evaluation.measuring.statistics import Estimate, bootstrap_mean, prompt_means
from diffalign.media.images import averaged

EDGE = 0.1  # brightness difference over two pixels that makes an edge; brightness is in [0, 1]
DARK = 0.1  # brightness below which a pixel is dark
THUMBNAIL = 32  # side at which two images are compared, so that diversity means layout and not texture


@dataclass(frozen=True)
class Concern:
    """The limit beyond which a statistic's change is a concern.

    A change counts if it exceeds ``tolerance`` times the base's value or ``floor``, whichever is larger, and
    its 95 % interval excludes 0.
    """

    title: str
    falls: bool
    rises: bool
    tolerance: float
    floor: float


CONCERNS: dict[str, Concern] = {
    "saturation": Concern("colour saturation", True, True, 0.3, 0.05),
    "edge_density": Concern("edge density", True, False, 0.3, 0.01),
    "colour_entropy": Concern("colour entropy", True, False, 0.2, 0.2),
    "sharpness": Concern("sharpness", True, True, 0.5, 0.01),
    "dark_fraction": Concern("share of dark pixels", False, True, 0.5, 0.1),
    "diversity": Concern("diversity within a prompt", True, False, 0.3, 0.01),
    # where LPIPS was measured: see ``perceptual``
    "lpips_diversity": Concern("LPIPS diversity within a prompt", True, False, 0.3, 0.02),
    # of videos: see ``motion``
    "dynamic_degree": Concern("dynamic degree (short sides a second)", True, False, 0.2, 0.01),
    "dynamic": Concern("share of dynamic videos", True, False, 0.2, 0.05),
    "motion_smoothness": Concern("smoothness of motion", True, False, 0.1, 0.05),
    "temporal_consistency": Concern("temporal consistency", True, False, 0.05, 0.02),
}


@dataclass(frozen=True)
class StatisticChange:
    """One statistic of base and aligned images (means over prompts), its paired change, and whether it is a
    concern."""

    name: str
    title: str
    base: float
    aligned: float
    change: Estimate
    flagged: bool


def _brightness(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.299, 0.587, 0.114])


def image_statistics(image: Image.Image) -> dict[str, float]:
    """Statistics of one image.

    saturation: mean of (max - min) / max over channels, 0 for black. edge_density: share of inner pixels
    whose central difference of brightness exceeds ``EDGE``. colour_entropy: bits of the histogram of 8 x 8 x
    8 colours, at most 9.
    sharpness: standard deviation of the brightness's Laplacian. dark_fraction: share of pixels below
    ``DARK``.
    """
    rgb = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    high, low = rgb.max(2), rgb.min(2)
    light = _brightness(rgb)
    centre = light[1:-1, 1:-1]
    across, down = light[1:-1, 2:] - light[1:-1, :-2], light[2:, 1:-1] - light[:-2, 1:-1]
    laplacian = light[1:-1, 2:] + light[1:-1, :-2] + light[2:, 1:-1] + light[:-2, 1:-1] - 4 * centre
    cells = np.minimum((rgb * 8).astype(np.int64), 7) @ np.array([64, 8, 1])
    share = np.bincount(cells.ravel(), minlength=512) / cells.size
    share = share[share > 0]
    return {
        "saturation": float(np.divide(high - low, high, out=np.zeros_like(high), where=high > 0).mean()),
        "edge_density": float((np.hypot(across, down) > EDGE).mean()),
        "colour_entropy": max(0.0, float(-(share * np.log2(share)).sum())),
        "sharpness": float(laplacian.std()),
        "dark_fraction": float((light < DARK).mean()),
    }


def thumbnail(image: Image.Image) -> np.ndarray:
    """(THUMBNAIL, THUMBNAIL, 3) float in [0, 1], by area averaging."""
    return averaged(image, THUMBNAIL).astype(np.float64) / 255


def diversity(thumbnails: Sequence[np.ndarray]) -> float:
    """Mean root-mean-square difference over all pairs of one prompt's thumbnails."""
    return float(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in combinations(thumbnails, 2)]))


def diversities(thumbnails: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, float]:
    """Diversity of each prompt that has two images or more."""
    groups: dict[str, list[np.ndarray]] = {}
    for small, prompt in zip(thumbnails, prompts, strict=True):
        groups.setdefault(prompt, []).append(small)
    return {prompt: diversity(group) for prompt, group in groups.items() if len(group) > 1}


def statistic_changes(
    base: Mapping[str, Sequence[float]],
    aligned: Mapping[str, Sequence[float]],
    prompts: Sequence[str],
    base_diversity: Mapping[str, float],
    aligned_diversity: Mapping[str, float],
    seed: int = 0,
) -> tuple[StatisticChange, ...]:
    """Compare statistics by name, N values each, and diversities by prompt where there are any."""
    changes = []
    for name in base:
        _, before = prompt_means(base[name], prompts)
        _, after = prompt_means(aligned[name], prompts)
        changes.append(_change(name, before, after, seed))
    if base_diversity:
        changes.append(diversity_change("diversity", base_diversity, aligned_diversity, seed))
    return tuple(changes)


def diversity_change(
    name: str, base: Mapping[str, float], aligned: Mapping[str, float], seed: int = 0
) -> StatisticChange:
    """Compare a statistic by prompt, of the same prompts, under its name in ``CONCERNS``."""
    before, after = np.array(list(base.values())), np.array([aligned[prompt] for prompt in base])
    return _change(name, before, after, seed)


def _change(name: str, before: np.ndarray, after: np.ndarray, seed: int) -> StatisticChange:
    concern = CONCERNS[name]
    change = bootstrap_mean(after - before, seed, resamples=2000)
    base, limit = float(before.mean()), max(concern.tolerance * float(before.mean()), concern.floor)
    fell = concern.falls and change.value < -limit and change.high < 0
    rose = concern.rises and change.value > limit and change.low > 0
    return StatisticChange(name, concern.title, base, float(after.mean()), change, fell or rose)
