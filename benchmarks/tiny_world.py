"""Make one row of a tiny image model: train a recipe, sample held-out prompts, score.

A base's images are sampled and scored once for all rows; every model starts from the same noise. Rewards are
the judge, which the shipped labels follow, and two that are not trained on: taste and a tiny CLIP.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import record
from benchmarks.arms import seeded
from benchmarks.counting import Calls, counted
from benchmarks.record import lock
from diffalign.config.files import find_config, read_yaml, shipped_configs
from diffalign.config.schema import ModelConfig, Run
from diffalign.diffusion.likelihood import step_kl
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import Ancestral, trajectory
from diffalign.evaluation.drawing.pipeline import fingerprint
from diffalign.evaluation.drawing.sampling import SamplingSettings, generate
from diffalign.evaluation.measuring.image_statistics import diversities, thumbnail
from diffalign.evaluation.measuring.statistics import compare
from diffalign.export.aligned import load_aligned
from diffalign.methods import build
from diffalign.methods.registry import shape_of
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.rewards import load as load_reward
from diffalign.rollout.model import PipelineRolloutModel
from diffalign.runs.align import Result, align
from diffalign.runs.demo import EVALUATION_SEED, REWARDS, SAMPLING
from diffalign.runs.rollouts import plan_of, steps_of_a_round
from diffalign.runs.validate import read_run
from diffalign.tiny.worlds import MEASURES, SCENES, Measures
from diffalign.utils.files import open_atomic, write_atomic

PREFIXES = {"tiny": "tiny_sdxl_", "sd3": "tiny_sd3_", "tiny64": "tiny_sdxl_"}  # of each world's recipes
PATTERN_SETS = {"tiny:pairs": "tiny:pattern_pairs"} | {
    f"tiny:{name}": f"tiny:pattern_{name}" for name in ("likes", "lists", "captions", "experts", "patches")
}
"""The sets of the world ``tiny64``, which trains the offline recipes of ``tiny`` on its model and sets."""
# Forward-equivalents of tiny_sdxl_dpo's 60 steps of 64 pairs: 2 trained samples (3 each) and 2 held ones.
BUDGET = 60 * 64 * 8.0
ONLINE_BUDGET = 3 * BUDGET  # includes the cost of sampling
COST_STEPS = 2  # steps over which a cost is averaged: some methods make random numbers of calls
HELD_OUT = 64  # groups on which the errors of winners and losers are measured
COST_VERSION = 1
DIVERSITY_PROMPTS, DIVERSITY_IMAGES = 32, 4  # prompts, and images of each, for the diversity
DIVERSITY_SEED = 1
STRIP = 6  # test captions whose images show what a method does
DRAWN = SCENES.measures
DRIFT_PROMPTS, DRIFT_STEPS, DRIFT_SEED = 64, 20, 2  # of the KL of the sampling process to the base's


def measures_of(model: ModelConfig) -> Measures:
    """Return how a tiny model is measured."""
    return MEASURES[model.path.removeprefix("tiny:")]


def quiet(line: str) -> None:
    """Discard a line of the job's output."""


def recipe(name: str, overrides: Sequence[str] = (), seed: int = 0, world: str = "tiny") -> Run:
    """Return the shipped tiny recipe of a method, with flags; all rows share one cache of latents."""
    run = read_run(PREFIXES[world] + name, [*flags(name, world), *overrides])
    cached = replace(run.data, cache_dir=str(record.WORK / "cache"), max_holdout=HELD_OUT)
    return replace(seeded(run, seed), data=cached)


def flags(name: str, world: str) -> list[str]:
    """Return the flags with which a world trains the recipe of a method."""
    if world != "tiny64":
        return []
    data = read_yaml(find_config(PREFIXES[world] + name))["data"]
    model = "tiny:sdxl64"
    changed = [f"--model.path={model}", f"--data.path={PATTERN_SETS[data['path']]}", "--data.resolution=64"]
    if "rewards" in data:
        changed.append(f"--data.rewards={measures_of(ModelConfig(model)).rewards[0]}")
    return changed


def names(world: str) -> list[str]:
    """Return the methods that have a recipe for a world."""
    prefix = PREFIXES[world]
    every = [n.removeprefix(prefix) for n in shipped_configs() if n.startswith(prefix)]
    return [n for n in every if _is_offline(prefix + n)] if world == "tiny64" else every


@lru_cache
def _is_offline(recipe: str) -> bool:
    data = read_yaml(find_config(recipe))
    return data.get("data", {}).get("path") in PATTERN_SETS and "rollout" not in data


def with_teachers(run: Run) -> Run:
    """Return a run whose teachers, which are runs of shipped recipes (``runs/RECIPE``), are trained, once."""
    folders = []
    for teacher in run.rollout.teachers:
        name = Path(teacher).name
        folder = record.WORK / "teachers" / name
        with lock(f"teacher-{name}"):
            if not (folder / "aligned").exists():
                align(replace(seeded(read_run(name), 0), output=str(folder)), quiet)
        folders.append(str(folder))
    return replace(run, rollout=replace(run.rollout, teachers=tuple(folders))) if folders else run


def settings_of(run: Run, split: str, prompts: int, steps: int | None = None) -> dict[str, Any]:
    """Return the settings that identify a row."""
    return {
        "method": build(run.method),
        "strategies": run.strategies,
        **({"rollout": run.rollout} if run.rollout.prompts else {}),
        "lora": run.model.lora if run.model.train == "lora" else "full",
        "data": replace(run.data, cache_dir=None, cache_batch_size=8, workers=0),
        "optimizer": run.optimizer,
        "batch_size": run.training.batch_size * run.training.accumulation,
        "split": split,
        "prompts": prompts,
        "steps": steps,
        "budget": None if steps else budget(run),
    }


def budget(run: Run) -> float:
    """Return the budget of a run in forward-equivalents."""
    return ONLINE_BUDGET if run.rollout.prompts else BUDGET


def digest(settings: Any) -> str:
    """Return 16 hexadecimal digits that identify settings."""
    stored = json.dumps(record.plain(settings), sort_keys=True)
    return hashlib.blake2b(stored.encode(), digest_size=8).hexdigest()


def round_of(run: Run) -> int:
    """Return the optimizer steps of a round of samples; 0 for a run without rounds."""
    if not run.rollout.prompts or shape_of(run.method["type"], run.rollout) == "gradients":
        return 0
    return steps_of_a_round(run, plan_of(run, load(run.model)))


def cost(run: Run) -> Calls:
    """Return the network calls of one step, measured once a recipe."""
    name = digest([COST_VERSION, settings_of(run, "", 0)])
    path = record.WORK / "costs" / f"{name}.json"
    with lock(f"cost-{name}"):
        if not path.exists():
            # a complete round, since its first step samples for all of it
            steps = round_of(run) or COST_STEPS
            short = replace(
                with_teachers(run),
                output=str(record.WORK / "work" / f"cost-{name}"),
                training=replace(run.training, steps=steps),
                data=replace(run.data, holdout=0.0),
            )
            with counted(type(load(run.model).network)) as calls:
                align(short, quiet)
            write_atomic(path, json.dumps(vars(calls.per(steps))))
            shutil.rmtree(short.output)
    return Calls(**json.loads(path.read_text()))


@lru_cache
def base(model: ModelConfig, split: str, prompts: int) -> dict[str, list[float]]:
    """Return the scores of a base model's images of the first ``prompts`` captions of a split, by reward."""
    pipeline = load(model).pipeline
    path = record.WORK / f"base-{split}-{prompts}-{fingerprint(pipeline)[:8]}.json"
    with lock(path.stem):
        if not path.exists():
            how = measures_of(model)
            found = scores(pipeline, split, prompts, rewards=how.rewards, measured=how)
            write_atomic(path, json.dumps(found))
    stored: dict[str, list[float]] = json.loads(path.read_text())
    return stored


@lru_cache
def _reward(name: str) -> Any:
    return load_reward(name)


def scores(
    pipeline: Any,
    split: str,
    prompts: int,
    settings: SamplingSettings = SAMPLING,
    rewards: Sequence[str] = REWARDS,
    measured: Measures = DRAWN,
) -> dict[str, list[float]]:
    """Return the scores of a pipeline's images, by reward, in the order of the prompts."""
    texts = measured.prompts(split, prompts)
    return scored(sampled(pipeline, texts, settings), texts, rewards)


def sampled(pipeline: Any, texts: Sequence[str], settings: SamplingSettings = SAMPLING) -> list[Image.Image]:
    """Return a pipeline's image of each text, from the noise that all models share."""
    samples = generate(pipeline, texts, settings, seed=EVALUATION_SEED, batch_size=64, progress=False)
    return [s.image for s in samples]


def scored(
    images: Sequence[Image.Image], texts: Sequence[str], rewards: Sequence[str]
) -> dict[str, list[float]]:
    """Return the scores of images of these texts, by reward."""
    return {name: [round(v, 4) for v in _reward(name)(images, texts).tolist()] for name in rewards}


def strip(name: str, recipe: Run) -> list[Image.Image]:
    """Return the images of the first ``STRIP`` test captions by the model of a row, trained if need be."""
    path = _strip_file(name, recipe)
    if not path.exists():
        texts = measures_of(recipe.model).prompts("test", STRIP)
        with trained(name, _whole(recipe, _affordable(recipe, cost(recipe)))) as (_, pipeline, _):
            _keep_strip(path, sampled(pipeline, texts))
    with Image.open(path) as joined:
        side = joined.height
        return [joined.crop((x, 0, x + side, side)) for x in range(0, joined.width, side)]


def _strip_file(name: str, recipe: Run) -> Path:
    return record.WORK / "strips" / f"{name}-{digest(settings_of(recipe, 'test', 0))}.png"


def _keep_strip(path: Path, images: Sequence[Image.Image]) -> None:
    """Write square images as one file, side by side."""
    joined = Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))
    with open_atomic(path) as file:
        joined.save(file, "png")


def diversity(pipeline: Any, split: str, measured: Measures = DRAWN) -> float:
    """Return the diversity of a pipeline's images of one caption, averaged over captions.

    It is the root mean square difference of pixels in [0, 1] over all pairs.
    """
    texts = measured.prompts(split, DIVERSITY_PROMPTS)
    samples = generate(
        pipeline,
        texts,
        SAMPLING,
        images_per_prompt=DIVERSITY_IMAGES,
        seed=DIVERSITY_SEED,
        batch_size=64,
        progress=False,
    )
    by_caption = diversities([thumbnail(s.image) for s in samples], [s.prompt for s in samples])
    return float(np.mean(list(by_caption.values())))


@lru_cache
def base_diversity(model: ModelConfig, split: str) -> float:
    """Return the diversity of a base model's images."""
    return diversity(load(model).pipeline, split, measures_of(model))


@torch.no_grad()
def drift(aligned: LoadedModel, base: LoadedModel, split: str, measured: Measures = DRAWN) -> float:
    """Return the KL of the aligned model's sampling process to the base's, in nats an image, unguided.

    The process is ancestral sampling (``Ancestral``), whose steps have the same noise in both models. The KL
    is the sum over steps along trajectories of the aligned model (Fan et al. 2023, DPOK, arXiv 2305.16381,
    lemma 4.2). It is an upper bound of the KL of the images.
    """
    inputs = PipelineRolloutModel(aligned, (measured.side, measured.side))
    cond, _ = inputs.encode(measured.prompts(split, DRIFT_PROMPTS))
    streams = Streams.at(DRIFT_SEED, 0, DRIFT_PROMPTS)
    x = streams.normal(DRIFT_PROMPTS, inputs.shape)
    policy, reference = aligned.denoiser(), base.denoiser()
    grid = aligned.grid(DRIFT_STEPS, inputs.shape)[:-1]  # the clean image is estimated, not drawn
    total = torch.zeros(DRIFT_PROMPTS)
    for step in trajectory(policy, kernel := Ancestral(), x, grid, cond, streams):
        ours, theirs = (kernel(model, step.x_t, step.t, step.s, cond) for model in (policy, reference))
        total += step_kl(ours[0], theirs[0], ours[1])
    return float(total.mean()) * x[0].numel()


def run(name: str, recipe: Run, split: str, prompts: int, steps: int | None = None) -> dict[str, Any]:
    """Train for ``steps`` (None: the budget's), and measure on the prompts of ``split``."""
    calls = cost(recipe)
    steps = steps or _affordable(recipe, calls)
    ready = _whole(recipe, steps)
    with trained(name, ready) as (result, pipeline, seconds):
        figures = _measured(name, result, pipeline, recipe, split, prompts)
    return {
        **figures,
        "primary": measures_of(recipe.model).rewards[0],
        "steps": steps,
        "seconds": round(seconds, 2),
        "calls": vars(calls),
        "compute": calls.cost * steps,
    }


def _affordable(recipe: Run, calls: Calls) -> int:
    """Return the number of steps of such calls in a recipe's budget."""
    return max(1, round(budget(recipe) / calls.cost))


def _whole(recipe: Run, steps: int) -> Run:
    """Return a recipe with its steps and its teachers, trained."""
    ready = with_teachers(recipe)
    return replace(ready, training=replace(ready.training, steps=steps))


@contextmanager
def trained(name: str, run: Run) -> Iterator[tuple[Result, Any, float]]:
    """Train a run and yield its result, the aligned pipeline and the processor seconds of the training.

    The run's folder is removed at the end.
    """
    output = record.WORK / "work" / name
    begin = time.process_time()
    result = align(replace(run, output=str(output)), quiet)
    seconds = time.process_time() - begin
    if result.aligned is None:
        raise KeyboardInterrupt
    pipeline = load_aligned(run.model, result.aligned)
    if run.model.train == "lora":
        pipeline.fuse_lora()  # reduces the sampling time to 60 %
    yield result, pipeline, seconds
    shutil.rmtree(output)


def _measured(
    name: str, result: Result, pipeline: Any, recipe: Run, split: str, prompts: int
) -> dict[str, Any]:
    measured = measures_of(recipe.model)
    texts = measured.prompts(split, prompts)
    before = base(ModelConfig(recipe.model.path), split, prompts)
    images = sampled(pipeline, texts)
    after = scored(images, texts, measured.rewards)
    table = {}
    for reward in measured.rewards:
        c = compare(before[reward], after[reward], texts)
        table[reward] = {
            "base": c.base,
            "aligned": c.aligned,
            "gain": [c.gain.value, c.gain.low, c.gain.high],
        }
    primary = measured.rewards[0]
    gained = {
        reward: [round(b - a, 4) for a, b in zip(before[reward], after[reward], strict=True)]
        for reward in measured.rewards
    }
    summary = json.loads((result.output / "summary.json").read_text())
    figures = {k: v for k, v in summary["held_out"].items() if k.startswith(("errors/", "images"))}
    if split == "test":
        _keep_strip(_strip_file(name, recipe), images[:STRIP])
        spread = diversity(pipeline, split, measured) / base_diversity(ModelConfig(recipe.model.path), split)
        figures["diversity"] = round(spread, 4)
        start = load(ModelConfig(recipe.model.path))
        figures["drift"] = round(drift(replace(start, pipeline=pipeline), start, split, measured), 3)
    return {
        "rewards": table,
        "gains": gained.pop(primary),
        "other gains": gained,
        "figures": figures,
        "verdict": result.verdict,
    }
