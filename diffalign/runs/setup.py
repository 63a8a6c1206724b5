"""What a run learns from: a preference set that is encoded once, or what the policy samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from diffalign.config.reward_schema import RewardRun
from diffalign.config.schema import DataConfig, Run
from diffalign.data import EncodedSet, PairSource, Preferences, encode_preferences, split_holdout
from diffalign.data.batches.order import lengths, scarce
from diffalign.data.batches.source import FixedBatches
from diffalign.data.encoding.geometry import size_of
from diffalign.data.reading.drop import leave_out
from diffalign.data.reading.examples import Example
from diffalign.diffusion.likelihood import PerSample
from diffalign.errors import UserError
from diffalign.methods import REGISTRY
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import DTYPES
from diffalign.models.precision import AUTOCAST
from diffalign.rewards import load as load_reward
from diffalign.rewards.scoring.rater import RewardRater
from diffalign.rollout.log import RoundLog
from diffalign.runs.memory_advice import when_encoding
from diffalign.runs.roles import Players, players
from diffalign.runs.rollouts import online_source
from diffalign.runs.validation import ValidationHook
from diffalign.training.acceleration import Accelerator
from diffalign.training.diagnostics import HeldOut
from diffalign.training.hooks import Hook
from diffalign.types import Denoiser, Source
from diffalign.utils.memory import advised


@dataclass(frozen=True)
class Material:
    """What a run learns from, who plays in it, and how to tell what came of it.

    Attributes:
        source: of batches.
        who: policy, reference and what moves.
        hooks: that look at the run.
        counts: what there was to learn from, in words.
        verdict: what came of it, in words.
        figures: the same in numbers.
        close: ends whatever was started for it.
    """

    source: Source
    who: Players
    hooks: list[Hook]
    counts: Callable[[], str]
    verdict: Callable[[], str]
    figures: Callable[[], dict[str, float]]
    close: Callable[[], None] = lambda: None


def offline(
    run: Run,
    model: LoadedModel,
    inner: Any,
    method: Any,
    preferences: Preferences,
    accelerator: Accelerator,
    tell: Callable[[str], None],
) -> Material:
    """Encode a preference set, keep some groups aside, and prepare the network.

    Args:
        run: the run.
        model: the loaded pipeline.
        inner: the method without its strategies.
        method: the method with them.
        preferences: the set.
        accelerator: of this process.
        tell: gets a line at each stage.

    Raises:
        UserError: labels of another kind than the method compares by, before anything is encoded where the
            rows tell it.
    """
    check_frames(run.data, model)
    _look_at_labels(run, inner, preferences)
    encoded = encode(run, model, preferences, accelerator)
    counts = ", ".join(text for text in (encoded.counts.text, lengths(encoded)) if text)
    tell(f"data: {counts}")
    _check_labels(run, inner, encoded.dense)
    learned, held_out = split_holdout(encoded, run.data.holdout, run.data.max_holdout, run.training.seed)
    learned = leave_out(learned, run.data.drop)
    who = players(run, model, method, AUTOCAST[run.training.mixed_precision])
    tell(f"training {_size(who):,} parameters on {len(learned)} groups, {len(held_out)} held out")
    step = run.training.batch_size * run.training.accumulation * accelerator.num_processes
    if few := scarce(learned, step):
        tell(
            f"warning: an optimizer step takes {step} groups of one size, of which there are fewer, so that "
            f"some steps see a group more than once: {few}"
        )
    diagnostics = _diagnostics(run, model, held_out, inner, who.base)
    return Material(
        pair_source(run, learned, model, accelerator, _guided(inner)),
        who,
        [diagnostics, ValidationHook(run, model, (), tell)],
        lambda: counts,
        lambda: diagnostics.verdict,
        lambda: dict(diagnostics.history[-1][1]) if diagnostics.history else {},
    )


def _look_at_labels(run: Run, inner: Any, preferences: Preferences) -> None:
    """Check the kind of labels by rows as they are read: the first one, or where dense ones are wanted all up
    to the first of them (a set may have both kinds, and a global label then counts for all frames).
    """
    if run.data.frames is None or run.data.view not in ("auto", "pairs") or run.data.rewards_as != "extra":
        return  # images, or labels that are made anew of what is read
    rows = (row for row in preferences.unfinished() if isinstance(row, Example))
    if REGISTRY[run.method["type"]].dense:
        _check_labels(run, inner, any(row.segments for row in rows))
    else:
        _check_labels(run, inner, any(row.segments for row in islice(rows, 1)))


def _check_labels(run: Run, inner: Any, dense: bool) -> None:
    """UserError where labels are dense and the method compares whole videos, or the other way round."""
    name = run.method["type"]
    if dense and isinstance(inner.reduce, PerSample):
        raise UserError(
            f"method.type={name!r} compares whole videos, but labels are dense; allowed: densedpo, or "
            "data.view majority, which makes one label of a video's"
        )
    if REGISTRY[name].dense and not dense:
        raise UserError(
            f"method.type={name!r} compares videos segment by segment, but no label is dense; allowed: rows "
            "with `segments` (`diffalign label-segments` makes them), or dpo"
        )


def online(
    run: Run,
    model: LoadedModel,
    method: Any,
    accelerator: Accelerator,
    fresh: bool,
    tell: Callable[[str], None],
    prompts: Sequence[str],
) -> Material:
    """Prepare the network and the source that samples with it; ``fresh`` runs continue no checkpoint.

    Raises:
        UserError: a model of videos, or what ``online_source`` refuses.
    """
    if model.codec.video:
        raise UserError(
            f"rollout.prompts={run.rollout.prompts!r}, but {model.family.name} is a model of videos, which "
            "are not sampled online; allowed: rollout.prompts empty and data.path, pairs of videos"
        )
    who = players(run, model, method, AUTOCAST[run.training.mixed_precision])
    once = lru_cache(load_reward)  # a reward that judges and is watched is one
    source = online_source(run, model, who, method, accelerator, fresh, once, prompts)
    tell(f"training {_size(who):,} parameters on what the policy samples for {run.rollout.prompts}")
    model.free_encoders()
    log = RoundLog(source)
    return Material(
        source,
        who,
        [
            log,
            ValidationHook(
                run, model, run.rollout.rewards if run.rollout.by == "rewards" else (), tell, once
            ),
        ],
        lambda: f"{log.images} images sampled for prompts of {run.rollout.prompts}",
        lambda: log.verdict,
        lambda: log.figures,
        source.close,
    )


def _size(who: Players) -> int:
    return sum(p.numel() for _, p in who.parameters)


def encode(
    run: Run | RewardRun, model: LoadedModel, preferences: Preferences, accelerator: Accelerator
) -> EncodedSet:
    """The preference set as latents and text embeddings; the frozen encoders then leave the accelerator."""
    check_frames(run.data, model)
    folder, rewards = Path(run.data.cache_dir or Path(run.output) / "cache"), run.data.rewards
    rater = RewardRater(rewards, folder / "scores.sqlite", str(accelerator.device)) if rewards else None
    with advised("encoding the preference set", when_encoding(run)):
        encoded = encode_preferences(
            model,
            preferences,
            run.data,
            folder,
            half=DTYPES[run.model.dtype] != torch.float32,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            barrier=accelerator.wait_for_everyone,
            rater=rater,
        )
    model.free_encoders()
    return encoded


def check_frames(data: DataConfig, model: LoadedModel) -> None:
    """UserError where images are given to a model of videos, videos to one of images, or sizes or a number of
    frames that it does not take.
    """
    if not model.codec.video and data.frames is not None:
        raise UserError(
            f"data.frames={data.frames}, but {model.family.name} is a model of images; allowed: null"
        )
    if model.codec.video and data.frames is None:
        raise UserError(
            f"data.frames is null, but {model.family.name} is a model of videos; allowed: such as "
            f"{model.usable_frames(17)} or {model.usable_frames(49)}"
        )
    if not data.buckets:
        model.latent_shape(*size_of(data), data.frames or 1)


def _diagnostics(
    run: Run, model: LoadedModel, held_out: EncodedSet, method: Any, reference: Denoiser | None
) -> HeldOut:
    """Held-out groups measured by the method without its strategies, a batch made whenever it is."""
    groups, seed = run.training.batch_size, run.training.seed
    batches = FixedBatches(held_out, model.family, run.data, groups, seed, _guided(method))
    return HeldOut(
        batches,
        run.logging.diagnostics_every,
        run.logging.diagnostics_bins,
        seed,
        method=method,
        reference=reference,
        groups=len(held_out),
    )


def _guided(method: Any) -> bool:
    """Whether a method asks for guided predictions, and so for what guidance guides away from."""
    return bool(method.noising.guidance != 1)


def pair_source(
    run: Run | RewardRun, learned: EncodedSet, model: LoadedModel, accelerator: Accelerator, guided: bool
) -> PairSource:
    """This rank's micro-batches of an encoded set; ``guided`` ones hold what guidance guides away from."""
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
