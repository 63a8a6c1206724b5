"""A whole run: load the model, encode the preferences once, train, leave what plain diffusers loads.

    from diffalign import Run, align
    align(Run(output="runs/mine", model=ModelConfig(path="..."), data=DataConfig(path="pairs.parquet")))

The run directory holds ``config.yaml`` (loads again), ``metrics.jsonl``, ``tensorboard/``, ``samples/``,
``checkpoints/``, ``cache/``, ``aligned/`` with its model card, and ``summary.json``.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.config import Run
from diffalign.config_io import to_yaml, validate
from diffalign.data import (
    EncodedSet,
    PairSource,
    Preferences,
    encode_preferences,
    fixed_batches,
    read_preferences,
    split_holdout,
)
from diffalign.data.drop import leave_out
from diffalign.errors import UserError
from diffalign.evaluation.sampling import SamplingSettings, generate
from diffalign.export.aligned import save_aligned
from diffalign.export.card import Card
from diffalign.files import write_atomic
from diffalign.methods import REGISTRY, build
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import DTYPES, load
from diffalign.players import check_players, players
from diffalign.randomness import derive
from diffalign.rewards.rater import RewardRater
from diffalign.strategies import wrap
from diffalign.training.acceleration import Accelerator, accelerator_for
from diffalign.training.checkpoint import Checkpoints, fingerprint
from diffalign.training.diagnostics import HeldOut
from diffalign.training.hooks import Every, Hook, standard_hooks
from diffalign.training.loop import train
from diffalign.training.state import TrainState
from diffalign.types import Denoiser

_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What may differ between a run and its continuation: it changes where things are kept, and no number.
_FREE = ("data.cache_dir", "data.workers", "data.cache_batch_size", "model.gradient_checkpointing")


@dataclass(frozen=True)
class Result:
    """What a run has left.

    Attributes:
        output: the run directory.
        aligned: ``output/aligned``, or None if the run was interrupted.
        steps: optimizer steps taken in all.
        seconds: time spent training, before an interruption included.
        interrupted: whether a signal has ended it early; ``resume: latest`` continues it.
        counts: what the preference set held, in words.
        verdict: what the held-out pairs say, in words.
    """

    output: Path
    aligned: Path | None
    steps: int
    seconds: float
    interrupted: bool
    counts: str
    verdict: str


def align(run: Run, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> Result:
    """Run ``run``; ``say`` gets a line at each stage, on the first process.

    Raises:
        UserError: anything wrong with the configuration, model or data, as early as it can be known.
    """
    validate(run)
    preferences = read_preferences(run.data, run.training.seed)
    inner: Any = build(_own_trajectories(run))
    method: Any = wrap(inner, run.strategies)
    check_players(run, method)
    accelerator = accelerator_for(run.training)
    tell = say if accelerator.is_main_process else lambda line: None
    output = Path(run.output)
    checkpoints = _checkpoints(run, output, accelerator)
    snapshot = checkpoints.start(run.resume)

    model = load(run.model, accelerator.device, compute=_AUTOCAST[run.training.mixed_precision])
    tell(f"model: {run.model.path} ({model.family.name}), {run.model.train}, on {accelerator.device.type}")
    encoded = encode(run, model, preferences, accelerator)
    tell(f"data: {encoded.counts.text}")
    learned, held_out = split_holdout(encoded, run.data.holdout, run.data.max_holdout, run.training.seed)
    learned = leave_out(learned, run.data.drop)
    who = players(run, model, method, _AUTOCAST[run.training.mixed_precision])
    count = sum(p.numel() for _, p in who.parameters)
    tell(f"training {count:,} parameters on {len(learned)} groups, {len(held_out)} held out")

    diagnostics = _diagnostics(run, model, held_out, inner, who.base)
    images = Every(run.validation.every, lambda state: _validate(state, model, run))
    extra: list[Hook] = [diagnostics, images, *who.hooks]
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(output / "config.yaml", to_yaml(run))
    state = train(
        method=method,
        denoiser_of=who.policy_of,
        reference=who.reference,
        network=model.network,
        parameters=who.parameters,
        source=_source(run, learned, model, accelerator, _guided(inner)),
        settings=run.training,
        optimizer=run.optimizer,
        accelerator=accelerator,
        hooks=standard_hooks(output, run.logging, run.checkpoint, checkpoints, extra, asdict(run)),
        resume=snapshot,
        kept=who.kept,
    )
    result = Result(
        output=output,
        aligned=None if state.interrupted else output / "aligned",
        steps=state.step,
        seconds=state.seconds,
        interrupted=state.interrupted,
        counts=encoded.counts.text,
        verdict=diagnostics.verdict,
    )
    if accelerator.is_main_process:
        _leave(result, run, model, state, diagnostics)
    accelerator.wait_for_everyone()
    return result


def _own_trajectories(run: Run) -> Mapping[str, Any]:
    """The method section, a folder of cached inversions made this base model's own: a trajectory is known by
    what was inverted, not by whom.

    Raises:
        UserError: the reference moves, so that what is kept would be wrong.
    """
    section = dict(run.method)
    noising = section.get("noising")
    holder = section if section.get("cache") else dict(noising) if isinstance(noising, Mapping) else {}
    if not holder.get("cache"):
        return run.method
    if run.training.reference_every:
        raise UserError(
            f"method cache={holder['cache']!r} with training.reference_every={run.training.reference_every}: "
            "a reference that moves inverts anew; allowed: one of them"
        )
    model = run.model
    whose = derive(0, model.path, str(model.revision), str(model.variant), model.dtype)
    holder["cache"] = str(Path(holder["cache"]) / f"{whose:016x}")
    return holder if section.get("cache") else {**section, "noising": holder}


def _checkpoints(run: Run, output: Path, accelerator: Accelerator) -> Checkpoints:
    """The run's checkpoints; refuses to write over another run's."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output={run.output!r} is a file; allowed: a folder, new or of a run to resume")
    settings = fingerprint(
        run.training,
        run.optimizer,
        accelerator.num_processes,
        ignore=_FREE,
        method=run.method,
        strategies=run.strategies,
        model=run.model,
        data=run.data,
    )
    checkpoints = Checkpoints(output / "checkpoints", run.checkpoint.limit, settings)
    if run.overwrite and run.resume is None and accelerator.is_main_process:
        checkpoints.clear()
    accelerator.wait_for_everyone()
    return checkpoints


def encode(run: Run, model: LoadedModel, preferences: Preferences, accelerator: Accelerator) -> EncodedSet:
    """The preference set as latents and text embeddings; the frozen encoders then leave the accelerator."""
    folder, rewards = Path(run.data.cache_dir or Path(run.output) / "cache"), run.data.rewards
    encoded = encode_preferences(
        model,
        preferences,
        run.data,
        folder,
        half=DTYPES[run.model.dtype] != torch.float32,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        barrier=accelerator.wait_for_everyone,
        rater=RewardRater(rewards, folder / "scores.sqlite", str(accelerator.device)) if rewards else None,
    )
    model.free_encoders()
    return encoded


def _diagnostics(
    run: Run, model: LoadedModel, held_out: EncodedSet, method: Any, reference: Denoiser | None
) -> HeldOut:
    """Held-out groups measured by the method without its strategies."""
    groups, seed = run.training.batch_size, run.training.seed
    batches = fixed_batches(held_out, model.family, run.data, groups, seed, _guided(method))
    return HeldOut(
        list(batches),
        run.logging.diagnostics_every,
        run.logging.diagnostics_bins,
        seed,
        method=method,
        reference=reference,
    )


def _guided(method: Any) -> bool:
    """Whether a method asks for guided predictions, and so for what guidance guides away from."""
    return bool(method.noising.guidance != 1)


def _source(
    run: Run, learned: EncodedSet, model: LoadedModel, accelerator: Accelerator, guided: bool
) -> PairSource:
    return PairSource(
        learned,
        model.family,
        run.data,
        run.training.batch_size,
        run.training.accumulation,
        accelerator.process_index,
        accelerator.num_processes,
        run.training.seed,
        guided,
    )


def _validate(state: TrainState, model: LoadedModel, run: Run) -> None:
    """Images of the validation prompts, with the same noise each time, under ``samples/step-N``."""
    accelerator, settings = state.accelerator, run.validation
    if accelerator.is_main_process:
        model.move_encoders(accelerator.device)
        with state.evaluating():
            generate(
                model.pipeline,
                list(settings.prompts),
                SamplingSettings(settings.sampling_steps, settings.guidance),
                images_per_prompt=settings.images_per_prompt,
                seed=settings.seed,
                folder=Path(run.output) / "samples" / f"step-{state.step:06d}",
                progress=False,
            )
        model.free_encoders()
    accelerator.wait_for_everyone()


def _leave(result: Result, run: Run, model: LoadedModel, state: TrainState, diagnostics: HeldOut) -> None:
    """Write ``aligned/`` with its card, and the summary."""
    held_out = dict(diagnostics.history[-1][1]) if diagnostics.history else {}
    if result.aligned is not None:
        with state.averaged_weights():
            save_aligned(model, result.aligned, _card(result, run, model, held_out).text())
    summary = {
        "method": run.method["type"],
        "steps": result.steps,
        "train_seconds": round(result.seconds, 3),
        "interrupted": result.interrupted,
        "data": result.counts,
        "verdict": result.verdict,
        "held_out": held_out,
        "skipped_steps": state.skipped_steps,
        "empty_steps": state.empty_steps,
    }
    write_atomic(result.output / "summary.json", json.dumps(summary, indent=2))


def _card(result: Result, run: Run, model: LoadedModel, held_out: Mapping[str, float]) -> Card:
    numbers: dict[str, float | int | str] = {"optimizer steps": result.steps, "data": result.counts}
    numbers |= {f"held-out {name}": value for name, value in held_out.items()}
    return Card(
        base_model=run.model.path,
        family=model.family.name,
        adapted=run.model.train == "lora",
        method=REGISTRY[run.method["type"]].title,
        numbers=numbers,
        settings=asdict(run),
        note=result.verdict,
    )
