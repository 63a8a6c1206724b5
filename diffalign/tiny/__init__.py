"""The embedded worlds: small laboratories on which every method runs in seconds to minutes.

*The plane* (`diffalign.plane.plane`) is two-dimensional and has a known optimum. *The drawn scenes* are
captions, a renderer (`scenes`), judges that read pixels (`judge`) and genuine diffusers pipelines with tiny
parts, whose weights and preference pairs ship with the package; *the moving shapes* (`motions`,
`motion_judge`) are the same for video. `python -m diffalign.tiny_build.build` makes them anew. Importing
this module imports no torch.
"""

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
FAMILIES = ("sdxl", "sd15", "sd3", "wan")


def _shipped(name: str) -> Path:
    path = WEIGHTS / name
    if not path.exists():
        raise FileNotFoundError(
            f"{name} is not among the package's data; make it: python -m diffalign.tiny_build.build"
        )
    return path


def pipeline_path(family: str = "sdxl") -> Path:
    """Folder that `StableDiffusionXLPipeline` ("sdxl"), `StableDiffusionPipeline` ("sd15"),
    `StableDiffusion3Pipeline` ("sd3", with `text_encoder_3=None, tokenizer_3=None`) or `WanPipeline` ("wan")
    loads.

    ValueError naming the allowed families for another word, FileNotFoundError if the weights were never
    built.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {list(FAMILIES)}, got {family!r}")
    return _shipped(family)


def pairs_path() -> Path:
    """Parquet file of preference pairs in Pick-a-Pic's schema, PNG bytes of 32 x 32 pixels in `jpg_0` and
    `jpg_1`.
    """
    return _shipped("pairs.parquet")


def clip_path() -> Path:
    """Folder of a CLIP of PickScore's format, for CLIPModel, CLIPTokenizer and CLIPImageProcessor."""
    return _shipped("clip")


def step_aware_path() -> Path:
    """Folder of a step-aware preference model of the tiny SDXL, for the reward `step_aware:tiny`."""
    return _shipped("step_aware")


def prompts(split: str, n: int | None = None) -> list[str]:
    """Return the first `n` distinct captions of "train", "validation" or "test" (all if None), always in
    the same
    order.

    The splits are disjoint by hash; pre-training captions and the pairs are of "train" only. ValueError
    naming what is allowed for another split, or for an `n` beyond the split's size.
    """
    from diffalign.tiny.scenes import split_captions

    return _first(split_captions(split), split, n)


def motion_prompts(split: str, n: int | None = None) -> list[str]:
    """As `prompts`, the captions of moving shapes, which the tiny video model draws."""
    from diffalign.tiny.motions import split_captions

    return _first(split_captions(split), split, n)


def _first(every: tuple[str, ...], split: str, n: int | None) -> list[str]:
    if n is not None and not 0 <= n <= len(every):
        raise ValueError(f"n must be from 0 to {len(every)} for split {split!r}, got {n}")
    return list(every[:n])
