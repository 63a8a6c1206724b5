"""A whole training of a reward: encode the preferences once, train, write a folder that loads as a reward.

The run directory holds ``config.yaml`` (loads again), ``metrics.jsonl``, ``checkpoints/``, ``cache/``,
``reward/`` (which ``step_aware:OUTPUT`` loads) and ``summary.json``.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.config.io import typed
from diffalign.config.reward_schema import RewardRun
from diffalign.data import (
    EncodedSet,
    Preferences,
    check_files,
    fixed_batches,
    read_preferences,
    split_holdout,
)
from diffalign.data.reading.drop import leave_out
from diffalign.diffusion.randomness import derive
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.models.decoder import load_decoder
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load as load_model
from diffalign.rewards.registry import Place
from diffalign.rewards.zoo import step_aware
from diffalign.rewards.zoo.clip import Clip
from diffalign.runs.folder import begin, record
from diffalign.runs.resume import FREE, PLACES, check_content, data_content, model_content, with_places
from diffalign.runs.reward.accuracy import AccuracyByTime, table
from diffalign.runs.reward.method import TOKENS, StepAwareTraining, Timed
from diffalign.runs.reward.validate import validate
from diffalign.runs.schedule import announcement, scheduled
from diffalign.runs.setup import encode, pair_source
from diffalign.training.acceleration import Accelerator, accelerator_for
from diffalign.training.checkpoint import Checkpoints, differences, fingerprint
from diffalign.training.hooks import standard_hooks
from diffalign.training.loop import train
from diffalign.training.state import TrainState
from diffalign.utils.files import atomic_folder, write_atomic
from diffalign.utils.lock import locked


@dataclass(frozen=True)
class RewardResult:
    """The result of a run.

    Attributes:
        output: the run directory.
        reward: ``output/reward``, or None if the run was interrupted.
        steps: total optimizer steps.
        seconds: training time, including that before an interruption.
        interrupted: whether a signal has stopped the run early; ``resume: latest`` continues it.
        before: held-out accuracy by time before training.
        after: the same at the end; empty if the run was interrupted.
        pairs: number of held-out groups.
    """

    output: Path
    reward: Path | None
    steps: int
    seconds: float
    interrupted: bool
    before: Mapping[str, float]
    after: Mapping[str, float]
    pairs: int


def train_reward(
    run: RewardRun, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> RewardResult:
    """Run ``run``; ``say`` gets a line at each stage, on the first process.

    Raises:
        UserError: anything wrong with the configuration, the models or the data, as early as it can be known.
    """
    run = typed(run)
    validate(run, needs=("model.path", "data.path"))
    preferences = read_preferences(run.data, run.training.seed)
    accelerator = accelerator_for(run.training)
    tell = say if accelerator.is_main_process else lambda line: None
    check_files(preferences, run.data, tell)
    with locked(Path(run.output)) if accelerator.is_main_process else nullcontext():
        return _trained(run, preferences, accelerator, tell)


def _trained(
    run: RewardRun, preferences: Preferences, accelerator: Accelerator, tell: Callable[[str], None]
) -> RewardResult:
    """Run ``run``, checked, in an output folder that no other process writes."""
    checkpoints = _checkpoints(run, accelerator, tell)
    snapshot = begin(run, checkpoints, accelerator, tell)
    clip = start(run, str(accelerator.device))
    model = load_model(run.model, accelerator.device)
    checkpoints.content["model"] = model_content(model)
    encoded = readied(_encoded(run, model, preferences, accelerator), clip)
    learned, held_out = split_holdout(encoded, run.data.holdout, run.data.max_holdout, run.training.seed)
    learned = leave_out(learned, run.data.drop, tell)
    checkpoints.content["data"] = data_content(learned, held_out)
    check_content(snapshot, checkpoints.content, None)
    processes = accelerator.num_processes
    settings = scheduled(run.training, len(learned), processes)
    parameters = [(name, p.requires_grad_()) for name, p in clip.model.named_parameters()]
    count = sum(p.numel() for _, p in parameters)
    tell(f"data: {encoded.counts.text}; {len(held_out)} groups held out")
    tell(f"training {count:,} parameters of {run.reward.start} on estimates of {run.model.path}")

    method = _method(run, model, accelerator)
    measuring = _held_out(run, model, held_out, method)
    before = measuring.measure(Timed(clip.model, clip), accelerator)
    tell(announcement(settings, len(learned), processes, snapshot.step if snapshot else 0))
    record(run, accelerator)
    state = train(
        method=method,
        denoiser_of=lambda prepared: Timed(prepared, clip),  # type: ignore[arg-type, return-value]
        reference=model.denoiser(),
        network=clip.model,
        parameters=parameters,
        source=pair_source(run, learned, model, accelerator, run.reward.guidance != 1),
        settings=settings,
        optimizer=run.optimizer,
        accelerator=accelerator,
        hooks=standard_hooks(
            Path(run.output), run.logging, run.checkpoint, checkpoints, [measuring], asdict(run)
        ),
        resume=snapshot,
    )
    result = RewardResult(
        output=Path(run.output),
        reward=None if state.interrupted else Path(run.output) / "reward",
        steps=state.step,
        seconds=state.seconds,
        interrupted=state.interrupted,
        before=before,
        after={} if state.interrupted else measuring.history[-1][1],
        pairs=len(held_out),
    )
    if accelerator.is_main_process:
        _leave(result, run, clip, state, encoded)
    accelerator.wait_for_everyone()
    return result


def start(run: RewardRun, device: str) -> Clip:
    """Return the CLIP with time input that ``reward.start`` names, in float32; new weights are drawn with the
    run's seed.

    Raises:
        UserError: it does not exist, or is no such model.
    """
    source, place = run.reward.start, Place(device)
    if source.startswith("step_aware:"):
        return step_aware.load(source.removeprefix("step_aware:") or None, place).clip
    if source == "tiny:clip":
        from diffalign import tiny

        source = str(tiny.clip_path())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(run.training.seed, "step aware"))
        return step_aware.from_clip(source, place)


@dataclass(frozen=True)
class _Tokens:
    """Token ids by prompt, in the form of a batch's conditions."""

    rows: Mapping[str, Tensor]

    def __call__(self, prompt: str) -> dict[str, Tensor]:
        return {TOKENS: self.rows[prompt]}


def readied(encoded: EncodedSet, clip: Clip) -> EncodedSet:
    """Return the set with the CLIP's tokens of every prompt; a group's weight is 1 / the number of groups of
    its prompt.

    Raises:
        UserError: groups without rivals, or with rivals of different prompts.
    """
    single = next((record for record in encoded if len(record.images) < 2 or record.texts), None)
    if single is not None:
        raise UserError(
            f"data.path: {single.where} has no two images of one prompt; a reward is trained on pairs or "
            "ranked lists"
        )
    uses = Counter(record.prompt for record in encoded)
    weighed = encoded.holding(replace(r, weight=r.weight / uses[r.prompt]) for r in encoded)
    tokens = clip.tokens(list(uses)) if uses else torch.zeros(0)
    return weighed.saying(_Tokens(dict(zip(uses, tokens, strict=True))))


def _checkpoints(run: RewardRun, accelerator: Accelerator, tell: Callable[[str], None]) -> Checkpoints:
    """Return the run's checkpoints: places of data and model may change, their content is compared."""
    sections = {"reward": run.reward, "model": run.model, "data": run.data}
    settings = fingerprint(
        run.training, run.optimizer, accelerator.num_processes, ignore=(*FREE, *PLACES), **sections
    )

    def compare(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
        kept = {name: value for name, value in saved.items() if name not in FREE}
        return differences(kept, with_places(current, saved, **sections))

    return Checkpoints(Path(run.output) / "checkpoints", run.checkpoint.limit, settings, compare, tell=tell)


def _encoded(
    run: RewardRun, model: LoadedModel, preferences: Preferences, accelerator: Accelerator
) -> EncodedSet:
    """Return the preference set, from the cache that alignment runs use; only the VAE stays in memory, if
    needed."""
    encoded = encode(run, model, preferences, accelerator)
    if run.reward.decoder is None:
        model.pipeline.vae.to(accelerator.device)
    return encoded


def _method(run: RewardRun, model: LoadedModel, accelerator: Accelerator) -> StepAwareTraining:
    settings = run.reward
    return StepAwareTraining(
        decode=model.decode
        if settings.decoder is None
        else load_decoder(settings.decoder, accelerator.device),
        guidance=settings.guidance,
        time=Uniform(settings.low, settings.high),
        threshold=settings.threshold,
        at_once=settings.at_once,
    )


def _held_out(
    run: RewardRun, model: LoadedModel, held_out: EncodedSet, method: StepAwareTraining
) -> AccuracyByTime:
    batches = fixed_batches(
        held_out, model.family, run.data, run.training.batch_size, run.training.seed, method.guidance != 1
    )
    return AccuracyByTime(
        method,
        model.denoiser(),
        list(batches),
        run.reward.evaluated,
        run.logging.diagnostics_every,
        run.training.seed,
    )


def _leave(result: RewardResult, run: RewardRun, clip: Clip, state: TrainState, encoded: EncodedSet) -> None:
    """Write the reward's folder and the summary."""
    if result.reward is not None:
        with state.averaged_weights(), atomic_folder(result.reward) as folder:
            step_aware.save(clip, folder)
    summary = {
        "start": run.reward.start,
        "model": run.model.path,
        "steps": result.steps,
        "train_seconds": round(result.seconds, 3),
        "interrupted": result.interrupted,
        "data": encoded.counts.text,
        "held_out": result.pairs,
        "accuracy_before": dict(result.before),
        "accuracy_after": dict(result.after),
    }
    write_atomic(result.output / "summary.json", json.dumps(summary, indent=2))


def verdict(result: RewardResult) -> list[str]:
    """Return lines with the accuracies before and after training."""
    if not result.before:
        return ["held-out accuracy: not measured, no pair was held out"]
    return table(result.before, result.after, result.pairs)
