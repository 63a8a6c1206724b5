"""The built-in synthetic tasks, on which every method runs in seconds to minutes.

*The plane* (`diffalign.plane.plane`) is two-dimensional with a known optimum. *The drawn scenes* are
captions, a renderer (`scenes`), rule-based judges of pixels (`judge`), and diffusers pipelines of tiny
networks, whose weights and preference pairs ship with the package. *The patterned scenes* (`patterns`,
`pattern_judge`) are a second, harder world of images. *The moving shapes* (`motions`, `motion_judge`) are the
same for video. `python -m diffalign.tiny_build.build` rebuilds the weights. Importing
this module does not import torch.
"""

from collections.abc import Callable
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
FAMILIES = {"sdxl": "sdxl", "sd15": "sd15", "sd3": "sd3", "wan": "wan", "sdxl64": "sdxl"}
"""The family of each tiny pipeline, by its name."""


def _shipped(name: str) -> Path:
    path = WEIGHTS / name
    if not path.exists():
        raise FileNotFoundError(
            f"{name} is not among the package's data; make it: python -m diffalign.tiny_build.build"
        )
    return path


def pipeline_path(family: str = "sdxl") -> Path:
    """Return the folder of a tiny diffusers pipeline.

    It loads with `StableDiffusionXLPipeline` ("sdxl", and "sdxl64", which draws patterned scenes),
    `StableDiffusionPipeline` ("sd15"), `StableDiffusion3Pipeline` ("sd3", with `text_encoder_3=None,
    tokenizer_3=None`) or `WanPipeline` ("wan").

    Raises:
        ValueError: another family.
        FileNotFoundError: the weights are missing.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {list(FAMILIES)}, got {family!r}")
    return _shipped(family)


def pairs_path() -> Path:
    """Return the parquet file of preference pairs in Pick-a-Pic's schema, with PNGs of 32 x 32 pixels."""
    return _shipped("pairs.parquet")


def clip_path() -> Path:
    """Return the folder of a tiny CLIP in PickScore's format, for transformers' CLIP classes."""
    return _shipped("clip")


def step_aware_path() -> Path:
    """Return the folder of the tiny SDXL's step-aware preference model, for the reward `step_aware:tiny`."""
    return _shipped("step_aware")


def prompts(split: str, n: int | None = None) -> list[str]:
    """Return the first `n` distinct captions of a split (all if None), in a fixed order.

    The splits "train", "validation" and "test" are disjoint by hash; pre-training captions and the pairs are
    of "train" only.

    Raises:
        ValueError: another split, or `n` exceeds the split's size.
    """
    from diffalign.tiny.scenes import split_captions

    return _first(split_captions(split), split, n)


def motion_prompts(split: str, n: int | None = None) -> list[str]:
    """Return captions of moving shapes, for the tiny video model; arguments as for `prompts`."""
    from diffalign.tiny.motions import split_captions

    return _first(split_captions(split), split, n)


def pattern_prompts(split: str, n: int | None = None) -> list[str]:
    """Return captions of patterned scenes, for the tiny SDXL of 64 pixels; arguments as for `prompts`.

    A split has millions of captions; these are the few thousand of `patterns.SIZES_OF_SPLITS`.
    """
    from diffalign.tiny.patterns import split_captions

    return _first(split_captions(split), split, n)


CAPTIONS: dict[str, Callable[[str, int | None], list[str]]] = {
    "": prompts,
    "motions/": motion_prompts,
    "patterns/": pattern_prompts,
}
"""Captions of a split of each world, by what stands before the split in `tiny:test`, `tiny:motions/test`."""


def _first(every: tuple[str, ...], split: str, n: int | None) -> list[str]:
    if n is not None and not 0 <= n <= len(every):
        raise ValueError(f"n must be from 0 to {len(every)} for split {split!r}, got {n}")
    return list(every[:n])
