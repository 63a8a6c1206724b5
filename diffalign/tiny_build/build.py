"""Make the package data of the drawn scenes: `python -m diffalign.tiny_build.build [PART] [--out DIR]
[--minutes M]`.

Parts are autoencoder, sdxl, sd15, sd3, wan_vae, wan, clip, pairs, step_aware, judges (figures only); for the
patterned scenes sdxl64_vae, sdxl64, pattern_judges (figures only); or all.
Each is written atomically, and its figures go to `report.json` and `report.md`. Weights are stored in
float16, which has no visible effect, and load as float32.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffalign.tiny import WEIGHTS
from diffalign.tiny_build.saving import forget_paths, half, replace_folder, save_pipeline, say

MINUTES = {
    "autoencoder": 9.0, "sdxl": 35.0, "sd15": 5.0, "sd3": 50.0, "wan_vae": 30.0, "wan": 14.0, "clip": 5.0,
    "pairs": 0.0, "step_aware": 0.0, "judges": 0.0,
    "sdxl64_vae": 7.0, "sdxl64": 30.0, "pattern_judges": 0.0,
}  # fmt: skip
PATTERN_PARTS = ("sdxl64_vae", "sdxl64", "pattern_judges")
PAIRS = 6000


def _autoencoder(out: Path, seconds: float, seed: int, resume: bool) -> dict[str, Any]:
    from diffalign.tiny_build import autoencoder

    vae, figures = autoencoder.train(seconds, seed, say, out / "vae" if resume else None)

    def save(fresh: Path) -> None:
        vae.save_pretrained(fresh)
        forget_paths(fresh)
        half(fresh)

    replace_folder(out / "vae", save)
    return figures


def _pipeline(family: str, out: Path, seconds: float, seed: int, resume: bool) -> dict[str, Any]:
    from diffusers import AutoencoderKL, DiffusionPipeline

    from diffalign.tiny_build import pretrain, report

    source = next((p for p in (out / "vae", out / "sdxl" / "vae") if p.exists()), None)
    if source is None:
        raise FileNotFoundError(
            f"no autoencoder in {out}; build it first: python -m diffalign.tiny_build.build autoencoder"
        )
    vae = AutoencoderKL.from_pretrained(source).eval()
    begin = out / ("sdxl" if family == "sd15" and not resume else family)  # SD 1.5 starts from SDXL's weights
    start = None
    if resume or (family == "sd15" and begin.exists()):
        start = pretrain.weights(family, DiffusionPipeline.from_pretrained(begin))
    parts, figures = pretrain.train(family, vae, seconds, seed, say, start_from=start)
    pipe = pretrain.pipeline(parts, vae)
    save_pipeline(pipe, out / family)
    for guidance in (1.0, 2.0):
        base = report.base(pipe, guidance=guidance)
        figures.update({f"{name}_guidance_{guidance:g}": value for name, value in base.items()})
    return figures


def _clip(out: Path, seconds: float, seed: int) -> dict[str, Any]:
    from diffalign.tiny_build import clip

    model, tokenizer, figures = clip.train(seconds, seed, say)

    def save(fresh: Path) -> None:
        clip.save(model, tokenizer, fresh)
        half(fresh)

    replace_folder(out / "clip", save)
    return figures


def _pairs(out: Path, seed: int) -> dict[str, Any]:
    from diffalign.tiny import pairs

    fresh = out / ".pairs.parquet"
    figures = pairs.write(fresh, PAIRS, seed)
    fresh.replace(out / "pairs.parquet")
    return figures


def _step_aware(out: Path, seed: int) -> dict[str, Any]:
    """Train by the recipe ``configs/rewards/tiny_reward.yaml``, from the shipped CLIP and pairs."""
    from diffalign.config.files import find_config, read_yaml
    from diffalign.config.io import apply_overrides, tree_from
    from diffalign.config.reward_schema import RewardRun
    from diffalign.runs.reward.job import train_reward

    with TemporaryDirectory() as work:
        run = tree_from(RewardRun, read_yaml(find_config("tiny_reward", "rewards")), "tiny_reward")
        run = apply_overrides(run, ["--output", f"{work}/run", "--training.seed", str(seed)])
        result = train_reward(run, say)
        if result.reward is None:
            raise KeyboardInterrupt

        def save(fresh: Path) -> None:
            shutil.copytree(Path(work) / "run" / "reward", fresh, dirs_exist_ok=True)
            half(fresh)

        replace_folder(out / "step_aware", save)
    return {"steps": result.steps, "before": dict(result.before), "after": dict(result.after)}


def build(part: str, out: Path, minutes: float, seed: int, resume: bool = False) -> dict[str, Any]:
    """Build one part in the folder `out`; return its figures, which are also written to the report."""
    from diffalign.tiny_build import report

    out.mkdir(parents=True, exist_ok=True)
    start, seconds = time.monotonic(), 60 * minutes
    if part == "autoencoder":
        figures = _autoencoder(out, seconds, seed, resume)
    elif part in ("sdxl", "sd15"):
        figures = _pipeline(part, out, seconds, seed, resume)
    elif part in ("sd3", "wan_vae", "wan"):
        from diffalign.tiny_build.build_flow import FLOWS

        figures = FLOWS[part](out, seconds, seed, resume)
    elif part in PATTERN_PARTS:
        from diffalign.tiny_build.build_patterns import PARTS

        figures = PARTS[part](out, seconds, seed, resume)
    elif part == "clip":
        figures = _clip(out, seconds, seed)
    elif part == "pairs":
        figures = _pairs(out, seed)
    elif part == "step_aware":
        figures = _step_aware(out, seed)
    else:
        figures = report.judges(seed)
    command = (
        f"python -m diffalign.tiny_build.build {part} --minutes {minutes:g} --seed {seed}"
        + " --resume" * resume
    )
    figures = {**figures, "seconds_in_all": round(time.monotonic() - start, 1), "command": command}
    report.write(out, part, figures)
    return figures


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m diffalign.tiny_build.build", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("part", nargs="?", default="all", choices=["all", *MINUTES])
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS, help="folder to write (default: the package's own)"
    )
    parser.add_argument("--minutes", type=float, help=f"training time of the part (default: {MINUTES})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="what is trained: go on from the checkpoint of an interrupted training, or the weights in --out",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    args = parser.parse_args(argv)
    if args.part == "all" and args.minutes is not None:
        parser.error("--minutes is for one part; 'all' takes each part's default")
    import torch

    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    for part in MINUTES if args.part == "all" else [args.part]:
        minutes = MINUTES[part] if args.minutes is None else args.minutes
        say(f"{part}: {build(part, args.out, minutes, args.seed, args.resume)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
