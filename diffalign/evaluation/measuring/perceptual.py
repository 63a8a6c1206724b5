"""FID against real images, and LPIPS between images: how far samples are from real ones and from each other.

FID (Heusel et al., arXiv 1706.08500) is the Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of
two Gaussians fitted to Inception's features. Its estimate is biased upward, by more the fewer the images and
by different amounts for different models (Chong and Forsyth, arXiv 1911.07023), so it is given with its
numbers of images. LPIPS (Zhang et al., arXiv 1801.03924) is a distance of two images by features of AlexNet:
here of base and aligned image of the same noise, and, as a diversity, of all pairs of images of one prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.evaluation.measuring.feature_networks import (
    LpipsNetwork,
    load_inception,
    load_lpips,
)
from diffalign.evaluation.measuring.measuring import FRAMES_LOOKED_AT
from diffalign.media.files import Media, MediaLike, open_image, open_media
from diffalign.media.frames import evenly_spaced, frame_image
from diffalign.media.images import IMAGE_SUFFIXES
from diffalign.media.videos import Video

FEATURES = 2048  # of Inception: of fewer images the covariance is singular
USUAL = 10_000  # images from which on the bias is usually called small
SMALLEST = 32  # pixels: AlexNet's last features vanish below
_AT_ONCE = 32  # images in a batch


@dataclass(frozen=True)
class PerceptualSettings:
    """What is measured beside rewards and statistics of pixels.

    Attributes:
        real: the folder of real images that FID compares with; None measures no FID.
        lpips: whether to measure LPIPS.
        open_inception: loads FID's network, see ``load_inception``.
        open_lpips: loads LPIPS' network, see ``load_lpips``.
    """

    real: Path | None = None
    lpips: bool = False
    open_inception: Callable[[], nn.Module] = lambda: load_inception("cpu")
    open_lpips: Callable[[], LpipsNetwork] = lambda: load_lpips("cpu")


@dataclass(frozen=True)
class Fid:
    """FID of base and aligned images against the same real images; ``images`` of each model, ``real`` real
    ones."""

    base: float
    aligned: float
    images: int
    real: int

    @property
    def caution(self) -> str:
        """What the numbers of images mean for the figure; empty where both are usual."""
        fewest = min(self.images, self.real)
        if fewest >= USUAL:
            return ""
        why = (
            f"below {FEATURES:,} the covariance of the {FEATURES:,} features is singular"
            if fewest < FEATURES
            else f"{USUAL:,} and more are usual"
        )
        return (
            f"FID of {self.images:,} images against {self.real:,} real ones is biased upward ({why}): "
            "compare it only with figures of as many images"
        )


@dataclass(frozen=True)
class Perceptual:
    """What was measured of one aligned model and the base.

    Attributes:
        fid: None if it was not measured.
        to_base: LPIPS of base and aligned image of the same noise, N; empty if not measured.
        base_diversity: mean LPIPS over pairs of images, by prompt with two images or more.
        aligned_diversity: the same of the aligned model.
    """

    fid: Fid | None
    to_base: tuple[float, ...]
    base_diversity: Mapping[str, float]
    aligned_diversity: Mapping[str, float]


def real_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders; UserError for fewer than two."""
    if not folder.is_dir():
        raise UserError(f"--fid is {str(folder)!r}, which is no folder; allowed: a folder of real images")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if len(found) < 2:
        raise UserError(
            f"--fid: {len(found)} images in {str(folder)!r}; FID needs two or more "
            f"({', '.join(IMAGE_SUFFIXES)})"
        )
    return found


def check_perceptual(settings: PerceptualSettings, images: int) -> None:
    """Check before sampling that ``images`` of each model can be measured: the folder, and the networks.

    Raises:
        UserError: see ``real_images`` and the networks' loading; or too few images for FID.
    """
    if settings.real is not None:
        real_images(settings.real)
        if images < 2:
            raise UserError(f"--fid with {images} image of each model; FID needs two or more")
        settings.open_inception()
    if settings.lpips:
        settings.open_lpips()


def measure_perceptual(
    settings: PerceptualSettings,
    base: Sequence[MediaLike],
    aligned: Mapping[str, Sequence[MediaLike]],
    prompts: Sequence[str],
    progress: bool = True,
) -> dict[str, Perceptual]:
    """Measure N images of the base and of every aligned model; each network is loaded once, and freed.

    Raises:
        UserError: see ``fids``, ``lpips_pairs`` and the networks' loading.
    """
    scores: dict[str, float] = {}
    real: list[Path] = []
    if settings.real is not None:
        real = real_images(settings.real)
        scores = fids(settings.open_inception(), real, {"": base, **aligned}, progress)
    distances: dict[str, tuple[float, ...]] = dict.fromkeys(aligned, ())
    spreads: dict[str, dict[str, float]] = {"": {}, **{name: {} for name in aligned}}
    if settings.lpips:
        network = settings.open_lpips()
        for name, images in aligned.items():
            pairs = list(zip(base, images, strict=True))
            distances[name] = tuple(lpips_pairs(network, pairs, progress, f"LPIPS of {name} to the base"))
        for name, images in {"": base, **aligned}.items():
            spreads[name] = lpips_diversities(network, images, prompts, progress, name or "base")
    return {
        name: Perceptual(
            Fid(scores[""], scores[name], len(images), len(real)) if scores else None,
            distances[name],
            spreads[""],
            spreads[name],
        )
        for name, images in aligned.items()
    }


def fids(
    network: nn.Module,
    real: Sequence[MediaLike],
    sets: Mapping[str, Sequence[MediaLike]],
    progress: bool = True,
) -> dict[str, float]:
    """Return each set's FID against ``real``, by torchmetrics.

    Args:
        network: images (N, 3, H, W) of uint8 to features (N, D).
        real: two or more images or files.
        sets: two or more images or files each.
        progress: whether to show a bar.

    Raises:
        UserError: torchmetrics is not installed, an image cannot be read, or a set has fewer than two.
    """
    for name, images in {"real images": real, **sets}.items():
        if len(images) < 2:
            raise UserError(f"FID needs two or more images, got {len(images)} of {name or 'base'}")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise UserError("FID needs torchmetrics; pip install 'diffalign[metrics]'") from error
    metric = FrechetInceptionDistance(feature=_ToCpu(network), reset_real_features=False)
    found = {}
    with tqdm(total=len(real) + sum(map(len, sets.values())), unit="image", disable=not progress) as bar:
        bar.set_description("FID, real images")
        for batch in _batches(real):
            metric.update(batch, real=True)
            bar.update(len(batch))
        for name, images in sets.items():
            bar.set_description(f"FID of {name or 'base'}")
            metric.reset()
            for batch in _batches(images):
                metric.update(batch, real=False)
                bar.update(len(batch))
            found[name] = float(metric.compute())
    return found


class _ToCpu(nn.Module):
    """A feature network wherever it lies, with images and features on the CPU, where sums are in float64."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: UInt8[Tensor, "N 3 H W"]) -> Tensor:
        """Features (N, D)."""
        device = next((p.device for p in self.network.parameters()), images.device)
        features: Tensor = self.network(images.to(device))
        return features.cpu()


def _batches(sources: Sequence[MediaLike]) -> Iterator[UInt8[Tensor, "N 3 H W"]]:
    """Yield images as tensors, neighbours of one size together."""
    for start in range(0, len(sources), _AT_ONCE):
        batch: list[Tensor] = []
        for source in sources[start : start + _AT_ONCE]:
            media = open_media(source)
            if isinstance(media, Video):
                raise UserError(f"FID compares images, and {source} is a video")
            pixels = _pixels(media)
            if batch and batch[0].shape != pixels.shape:
                yield torch.stack(batch)
                batch = []
            batch.append(pixels)
        yield torch.stack(batch)


def _pixels(image: Media) -> UInt8[Tensor, "3 H W"]:
    """Return an image's pixels."""
    return torch.from_numpy(np.array(open_image(image))).permute(2, 0, 1)  # type: ignore[arg-type]


def lpips_pairs(
    network: LpipsNetwork,
    pairs: Sequence[tuple[MediaLike, MediaLike]],
    progress: bool = True,
    title: str = "LPIPS",
) -> list[float]:
    """Return the LPIPS distance of each pair of images; of two videos the mean over some frames.

    Raises:
        UserError: a file cannot be read, or two images of a pair differ in size or are below ``SMALLEST``
            pixels.
    """
    found = []
    for first, second in tqdm(pairs, desc=title, unit="pair", disable=not progress):
        one, other = _stack(first), _stack(second)
        if one.shape != other.shape or min(one.shape[-2:]) < SMALLEST:
            raise UserError(
                f"LPIPS of {_said(one)} and {_said(other)} ({first}, {second}); allowed: two of one size, of "
                f"{SMALLEST} pixels or more a side"
            )
        found.append(float(network(one, other).mean()))
    return found


def _stack(source: MediaLike) -> Tensor:
    """Return an image, (1, 3, H, W) in [0, 1], or so many frames of a video."""
    media = open_media(source)
    images = [media]
    if isinstance(media, Video):
        images = [frame_image(media, k) for k in evenly_spaced(len(media.frames), FRAMES_LOOKED_AT)]
    return torch.stack([_pixels(image) for image in images]).float() / 255


def _said(images: Tensor) -> str:
    frames, _, height, width = images.shape
    return f"{width} x {height} pixels" + (f" of {frames} frames" if frames > 1 else "")


def lpips_diversities(
    network: LpipsNetwork,
    sources: Sequence[MediaLike],
    prompts: Sequence[str],
    progress: bool = True,
    title: str = "",
) -> dict[str, float]:
    """Return the mean LPIPS over all pairs of images of each prompt that has two or more."""
    groups: dict[str, list[MediaLike]] = {}
    for source, prompt in zip(sources, prompts, strict=True):
        groups.setdefault(prompt, []).append(source)
    several = {prompt: list(combinations(group, 2)) for prompt, group in groups.items() if len(group) > 1}
    flat = [pair for pairs in several.values() for pair in pairs]
    values = iter(lpips_pairs(network, flat, progress, f"LPIPS within prompts of {title}") if flat else [])
    return {prompt: float(np.mean([next(values) for _ in pairs])) for prompt, pairs in several.items()}
