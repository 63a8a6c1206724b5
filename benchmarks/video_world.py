"""Make one row of an arm on moving shapes, and the pairs of takes that arms are trained on.

Pairs are made once and stored under ``runs/``: *guided* ones are two takes of one real clip, *independent*
ones two samples of its caption. The content judge, which ignores motion, labels every half second of both.
The base's test videos are sampled and scored once; every model starts from the same noise.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.arms import seeded
from benchmarks.record import lock
from diffalign import tiny
from diffalign.config.schema import ModelConfig, Run
from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.randomness import derive
from diffalign.evaluation.drawing.pipeline import fingerprint
from diffalign.evaluation.measuring.motion import motion_statistics
from diffalign.evaluation.measuring.statistics import compare
from diffalign.export.aligned import load_aligned
from diffalign.media.videos import Video, write_video
from diffalign.methods import build
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.preferences.segments.by_reward import ByReward
from diffalign.preferences.segments.label import label_pairs
from diffalign.preferences.segments.pairs import read_pairs
from diffalign.preferences.video_takes.clips import Clip
from diffalign.preferences.video_takes.guided import denoised, noised
from diffalign.preferences.video_takes.make import PairSettings, times_of
from diffalign.rewards import load as load_reward
from diffalign.runs.align import align
from diffalign.runs.validate import read_run
from diffalign.tiny import motions
from diffalign.tiny.motion_judge import dynamics
from diffalign.utils.files import write_atomic

MODEL = ModelConfig(path="tiny:wan", max_sequence_length=16)
PAIRS = 900
STEPS, GUIDANCE = 20, 3.0  # of the sampler of pairs
MEASURED = 10  # sampling steps of measured videos
SEGMENT = 0.5  # length of a segment in seconds
MARGIN = 0.05  # difference of scores up to which a segment is a tie
BATCH = 64
QUALITY, MOTION = "video_content", "dynamics"
REWARDS = (QUALITY, "video_motion")


@dataclass(frozen=True)
class VideoArm:
    """An arm: a method, its pairs and their share.

    Attributes:
        name: name of the arm.
        recipe: recipe with its settings.
        eta: range of noise levels of the model's pairs; (1, 1): independent samples; None: the recipe's own
            pairs, which are renders.
        share: share of the pairs that is used.
        says: description for the table.
    """

    name: str
    recipe: str
    eta: tuple[float, float] | None
    share: float
    says: str

    @property
    def flags(self) -> list[str]:
        """The flags in addition to the recipe."""
        if self.eta is None:
            return []
        view = [] if self.recipe.endswith("densedpo") else ["--data.view=majority"]
        return [*view, "--method.beta=300", "--optimizer.learning_rate=1e-3"]


GUIDED, INDEPENDENT = (0.65, 0.8), (1.0, 1.0)
DPO, DENSE = "tiny_wan_dpo", "tiny_wan_densedpo"
ARMS = (
    VideoArm("vanilla-true", DPO, None, 1.0, "Diffusion-DPO, two clips of a caption, a label a pair"),
    VideoArm("dense-true", DENSE, None, 1.0, "DenseDPO, two clips of a motion, a label a half second"),
    VideoArm("vanilla", DPO, INDEPENDENT, 1.0, "Diffusion-DPO, two samples, a label a pair"),
    VideoArm("dense", DENSE, GUIDED, 1.0, "DenseDPO, guided pairs, a label a half second"),
    VideoArm("dense-third", DENSE, GUIDED, 1 / 3, "the same with a third of the pairs"),
    VideoArm("structural", DPO, GUIDED, 1.0, "Diffusion-DPO, guided pairs, a label a pair"),
)


def pairs_of(eta: tuple[float, float]) -> Path:
    """Return the file of the labelled pairs of a kind, making it if needed."""
    name = "independent" if eta == INDEPENDENT else "guided"
    model = load(MODEL)
    folder = record.WORK / "video" / f"{name}-{PAIRS}-{fingerprint(model.pipeline)[:8]}"
    with lock(folder.name):
        labelled = folder / "labelled.jsonl"
        if not labelled.exists():
            _make(model, PairSettings(32, 32, motions.FRAMES, motions.FPS, eta, STEPS, GUIDANCE), folder)
            judge = ByReward({QUALITY: load_reward(QUALITY)}, MARGIN, SEGMENT)
            pairs = str(folder / "pairs.jsonl")
            label_pairs(read_pairs(pairs), judge, pairs, labelled, seconds=SEGMENT)
    return labelled


def _make(model: LoadedModel, settings: PairSettings, folder: Path) -> None:
    """Make pairs of takes; clips with equal noise levels are batched."""
    clips = [
        (Clip(f"{number:05}", caption, Path(f"{number:05}.mp4")), video)
        for number, (caption, video) in enumerate(motions.clips("train", PAIRS))
    ]
    by_steps: dict[int, list[int]] = {}
    for number, (clip, _) in enumerate(clips):
        by_steps.setdefault(round(settings.eta_of(clip, 0) * settings.steps), []).append(number)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for steps, numbers in sorted(by_steps.items()):
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            eta = steps / settings.steps
            takes = _takes(model, [clips[n] for n in batch], settings, eta)
            for n, both in zip(batch, zip(*takes, strict=True), strict=True):
                names = [f"{n:05}-{member}.mp4" for member in (0, 1)]
                for file, pixels in zip(names, both, strict=True):
                    write_video(_video(pixels), folder / file)
                rows[n] = {"prompt": clips[n][0].prompt, "videos": names, "eta": eta}
    write_atomic(folder / "pairs.jsonl", "".join(json.dumps(rows[n]) + "\n" for n in sorted(rows)))


def _video(pixels: Tensor) -> Video:
    """Return pixels (3, F, H, W) in [0, 1] as a video."""
    return Video((pixels * 255).round().to(torch.uint8).transpose(0, 1).contiguous(), motions.FPS)


@torch.no_grad()
def _takes(
    model: LoadedModel, clips: Sequence[tuple[Clip, Video]], settings: PairSettings, eta: float
) -> list[Tensor]:
    """Return the pixels (B, 3, F, H, W) of the first takes and of the second takes."""
    pixels = torch.stack([video.frames.transpose(0, 1) for _, video in clips]).float() / 127.5 - 1
    clean = model.encode_pixels(pixels)[0]
    cond = model.encode_prompts([clip.prompt for clip, _ in clips])
    denoiser = Guided(model.denoiser(), model.negative(len(clips)), settings.guidance)
    times = times_of(model, settings, eta, tuple(clean.shape[1:]))
    takes = []
    for member in (0, 1):
        seeds = [derive(settings.seed, "noise", clip.name, 0, member) for clip, _ in clips]
        eps = torch.stack(
            [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        start = eps if eta == 1 else noised(denoiser, clean, eps, times)
        takes.append(model.decode(denoised(denoiser, start, times, cond)))
    return takes


def recipe(arm: VideoArm, seed: int) -> Run:
    """Return the run of an arm."""
    run = read_run(arm.recipe, arm.flags)
    return replace(
        seeded(run, seed),
        data=replace(
            run.data,
            path=run.data.path if arm.eta is None else str(pairs_of(arm.eta)),
            limit=round(arm.share * PAIRS),
            segment_seconds=run.data.segment_seconds if arm.eta is None else SEGMENT,
            cache_dir=str(record.WORK / "cache"),
            max_holdout=32,
        ),
    )


def settings_of(arm: VideoArm, seed: int, prompts: int) -> dict[str, Any]:
    """Return the settings that identify a row."""
    run = recipe(arm, seed)
    return {
        "method": build(run.method),
        "lora": run.model.lora,
        "data": replace(run.data, path=arm.name, cache_dir=None, cache_batch_size=8, workers=0),
        "optimizer": run.optimizer,
        "steps": run.training.steps,
        "batch_size": run.training.batch_size * run.training.accumulation,
        "base": fingerprint(load(MODEL).pipeline),
        "prompts": prompts,
        "measured_steps": MEASURED,
    }


def measured(arm: VideoArm, seed: int, prompts: int) -> dict[str, Any]:
    """Train an arm and compare its videos with the base's."""
    return trained(recipe(arm, seed), f"video-{arm.name}-{seed}", prompts)


def trained(run: Run, name: str, prompts: int) -> dict[str, Any]:
    """Train a run of the tiny Wan and compare its videos of held-out captions with the base's."""
    output = record.WORK / "work" / name
    begin = time.process_time()
    result = align(replace(run, output=str(output)), lambda line: None)
    seconds = time.process_time() - begin
    if result.aligned is None:
        raise KeyboardInterrupt
    texts = tiny.motion_prompts("test", prompts)
    before, after = base(prompts), scores(_aligned(result.aligned), texts)
    table = {}
    for reward in before:
        c = compare(before[reward], after[reward], texts)
        table[reward] = {
            "base": c.base,
            "aligned": c.aligned,
            "gain": [c.gain.value, c.gain.low, c.gain.high],
        }
    gains = {
        reward: [round(b - a, 4) for a, b in zip(before[reward], after[reward], strict=True)]
        for reward in before
    }
    shutil.rmtree(output)
    return {"rewards": table, "gains": gains, "seconds": round(seconds, 1), "verdict": result.verdict}


def _aligned(folder: Path) -> LoadedModel:
    """Return the base with the adapters of a run merged into it."""
    model = load(MODEL)
    model.pipeline = load_aligned(MODEL, folder)
    model.pipeline.fuse_lora()
    return model


@lru_cache
def base(prompts: int) -> dict[str, list[float]]:
    """Return the scores of the base's videos of the first test captions, by name."""
    model = load(MODEL)
    path = record.WORK / f"base-video-{prompts}-{MEASURED}-{fingerprint(model.pipeline)[:8]}.json"
    with lock(path.stem):
        if not path.exists():
            write_atomic(path, json.dumps(scores(model, tiny.motion_prompts("test", prompts))))
    stored: dict[str, list[float]] = json.loads(path.read_text())
    return stored


def scores(model: LoadedModel, texts: Sequence[str]) -> dict[str, list[float]]:
    """Return judges' scores and motion statistics of a model's videos, in the order of the prompts."""
    videos = list(_drawn(model, texts))
    table = {name: load_reward(name)(videos, texts).tolist() for name in REWARDS}
    frames = [video.frames.permute(0, 2, 3, 1).numpy() for video in videos]
    table[MOTION] = [dynamics(f, text) for f, text in zip(frames, texts, strict=True)]
    table["dynamic_degree"] = [motion_statistics(video)["dynamic_degree"] for video in videos]
    return {name: [round(value, 4) for value in values] for name, values in table.items()}


@torch.no_grad()
def _drawn(model: LoadedModel, texts: Sequence[str]) -> Iterator[Video]:
    """Yield one video a prompt by Euler steps on the model's grid; the noise does not depend on the model."""
    shape = model.latent_shape(32, 32, motions.FRAMES)
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        seeds = range(start, start + len(batch))
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        denoiser = Guided(model.denoiser(), model.negative(len(batch)), GUIDANCE)
        latents = denoised(denoiser, noise, model.grid(MEASURED, shape), model.encode_prompts(batch))
        yield from (_video(pixels) for pixels in model.decode(latents))
