"""Set up the data of a run: a preference set that is encoded once, or samples of the policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from diffalign.config.reward_schema import RewardRun
from diffalign.config.schema import DataConfig, Run
from diffalign.data import (
    EncodedSet,
    PairSource,
    Preferences,
    encode_preferences,
    read_preferences,
    split_holdout,
)
from diffalign.data.batches.order import lengths, scarce
from diffalign.data.batches.source import FixedBatches
from diffalign.data.batches.streamed import StreamedSource
from diffalign.data.encoding.folder import Folder
from diffalign.data.encoding.geometry import size_of
from diffalign.data.reading.drop import leave_out
from diffalign.data.reading.time_labels import with_time_labels
from diffalign.diffusion.spans import span_of
from diffalign.errors import UserError
from diffalign.methods import REGISTRY, build
from diffalign.methods.registry import shape_of
from diffalign.models.context import check_parts
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import DTYPES
from diffalign.models.placing import discard_encoders, move_networks
from diffalign.models.precision import AUTOCAST
from diffalign.rewards import load as load_reward
from diffalign.rewards.scoring.rater import RewardRater
from diffalign.rollout.beside import WithData
from diffalign.rollout.log import RoundLog
from diffalign.rollout.noise import NoiseSource
from diffalign.rollout.source import OnlineSource
from diffalign.runs.labels import (
    check_labels,
    check_rivals,
    look_at_labels,
    look_at_votes,
    tell_of_contents,
    tell_of_cut_prompts,
    tell_of_list,
    tell_of_unread,
    tell_of_votes,
    tell_unliked,
)
from diffalign.runs.memory_advice import when_encoding
from diffalign.runs.resume import data_content, prompts_content
from diffalign.runs.reward_gradients import noise_source
from diffalign.runs.roles import Roles, assign_roles
from diffalign.runs.rollouts import online_source
from diffalign.runs.schedule import groups_per_step
from diffalign.runs.scores import RoundScores, check_scores
from diffalign.runs.validation import ValidationHook
from diffalign.training.acceleration import Accelerator
from diffalign.training.context import context_mesh, context_summary, group_of
from diffalign.training.diagnostics import HeldOut
from diffalign.training.hooks import Hook
from diffalign.training.sharding import sharding_of, sharding_summary
from diffalign.types import Denoiser, Method
from diffalign.utils.memory import advised


@dataclass(frozen=True)
class Setup:
    """The inputs of training besides its settings.

    Attributes:
        source: of batches.
        roles: policy, reference and weights that hooks update.
        hooks: called around steps.
        outcome: the hook that measures the result of the run.
        data: a sentence on the training data.
        content: digest of the training data.
        groups: preference groups that are trained on; None: an online source, which has no end.
    """

    source: PairSource | StreamedSource | OnlineSource | NoiseSource | WithData
    roles: Roles
    hooks: Sequence[Hook]
    outcome: HeldOut | RoundLog
    data: str
    content: str
    groups: int | None = None

    @property
    def counts(self) -> str:
        """Return a sentence on the data used so far."""
        if isinstance(self.source, StreamedSource):
            return self.source.counts
        return f"{self.outcome.images} {self.data}" if isinstance(self.outcome, RoundLog) else self.data

    def close(self) -> None:
        """Close the source."""
        if isinstance(self.source, OnlineSource | StreamedSource | WithData):
            self.source.close()


def offline(
    run: Run,
    model: LoadedModel,
    inner: Method[Any],
    method: Method[Any],
    *,
    preferences: Preferences,
    accelerator: Accelerator,
    tell: Callable[[str], None],
) -> Setup:
    """Encode a preference set, hold out some groups, and prepare the network.

    Args:
        run: the run.
        model: the loaded pipeline.
        inner: the method without its strategies.
        method: the method with them.
        preferences: the set.
        accelerator: of this process.
        tell: gets a line at each stage.

    Raises:
        UserError: labels of another kind than the method needs; before anything is encoded where the rows
            show it.
    """
    check_frames(run.data, model)
    check_parts(model, run.training.context, None if run.data.buckets else size_of(run.data), run.data.frames)
    if run.data.own_sizes:
        tell(
            "warning: data.own_sizes tells SDXL each image's own original size; where winners and losers "
            "differ in size, that alone tells who won"
        )
    look_at_labels(run, inner, preferences)
    look_at_votes(run, preferences, tell)
    encoded = encode(run, model, preferences, accelerator)
    if run.model.train == "lora" and not run.validation.every:  # else sampled with, or saved with the network
        discard_encoders(model)
    counts = ", ".join(text for text in (encoded.counts.text, lengths(encoded.records)) if text)
    for note in preferences.notes:
        tell(f"data: {note}")
    tell(f"data: {counts}")
    tell_unliked(run.method["type"], encoded.counts, tell)
    check_rivals(run, encoded, tell)
    tell_of_contents(encoded, tell)
    tell_of_cut_prompts(model, tell)
    tell_of_votes(run, encoded, tell)
    tell_of_unread(run, inner, encoded, tell)
    check_labels(run, inner, encoded.dense)
    check_scores(inner, encoded, tell)
    learned, held_out = split_holdout(encoded, run.data.holdout, run.data.max_holdout, run.training.seed)
    learned = with_time_labels(leave_out(learned, run.data.drop, tell), run.data.time_labels, tell)
    sharding = sharding_of(run.training, accelerator)
    # of a network that is sharded its parts alone go there
    move_networks(model, accelerator.device, trained=sharding is None)
    mesh = context_mesh(run.training, accelerator)
    roles = assign_roles(run, model, method, AUTOCAST[run.training.mixed_precision], sharding, mesh)
    if run.training.shard != "none":
        tell(sharding_summary(sharding, run.training, roles.network))
    _, processes = group_of(run.training, accelerator)
    if mesh is not None:
        tell(context_summary(run.training, processes))
    groups = f"{len(learned)} group{'s' * (len(learned) != 1)}"
    tell(f"training {size(roles):,} parameters on {groups}, {len(held_out)} held out")
    _tell_of_scarce(learned, groups_per_step(run.training, processes), tell)
    outcome = diagnostics(run, model, held_out, inner, roles.base)
    return Setup(
        pair_source(run, learned, model, accelerator, guided(inner)),
        roles,
        [outcome, ValidationHook(run, model, (), tell)],
        outcome,
        counts,
        data_content(learned, held_out),
        len(learned),
    )


def _tell_of_scarce(learned: EncodedSet, step: int, tell: Callable[[str], None]) -> None:
    """Warn of sizes of which there are fewer groups than an optimizer step takes."""
    if few := scarce(learned.records, step):
        tell(
            f"warning: an optimizer step takes {step} groups of one size, of which there are fewer, so that "
            f"some steps see a group more than once: {few}"
        )


def online(
    run: Run,
    model: LoadedModel,
    method: Method[Any],
    accelerator: Accelerator,
    *,
    fresh: bool,
    tell: Callable[[str], None],
    prompts: Sequence[str],
) -> Setup:
    """Prepare the network and the source that samples with it; ``fresh`` runs continue no checkpoint.

    Raises:
        UserError: images of a model of videos or the reverse, or what ``online_source`` refuses.
    """
    check_kind(run.data, model)
    real = None
    if REGISTRY[run.method["type"]].beside:
        real = encode(run, model, read_preferences(run.data, run.training.seed), accelerator)
        tell(f"data: {real.counts.text}, beside what is sampled")
    roles = assign_roles(run, model, method, AUTOCAST[run.training.mixed_precision])
    once = lru_cache(load_reward)  # a reward is loaded once for rollout and validation
    tell(f"training {size(roles):,} parameters on what the policy samples for {run.rollout.prompts}")
    tell_of_list(prompts, tell)
    source: OnlineSource | NoiseSource | WithData
    if shape_of(run.method["type"], run.rollout) in ("gradients", "distillation"):
        model.free_encoders()
        source = noise_source(run, model, accelerator, once, prompts)
    else:
        source = online_source(
            run, model, roles, method, accelerator,
            fresh=fresh, load=once, prompts=prompts, check=RoundScores(build(run.method), tell),
        )  # fmt: skip
        model.free_encoders()
        if real is not None:
            source = WithData(source, pair_source(run, real, model, accelerator, guided=False))
    log = RoundLog(source, Path(run.output) / "metrics.jsonl")
    trained = run.rollout.rewards if run.rollout.by == "rewards" else ()
    hooks: list[Hook] = [log, ValidationHook(run, model, trained, tell, once)]
    kind = "videos" if model.codec.video else "images"
    data = f"{kind} sampled for prompts of {run.rollout.prompts}"
    content = prompts_content(prompts) + ("" if real is None else data_content(real))
    return Setup(source, roles, hooks, log, data, content)


def size(roles: Roles) -> int:
    """Return the number of parameters that are trained."""
    return sum(p.numel() for _, p in roles.parameters)


def encode(
    run: Run | RewardRun, model: LoadedModel, preferences: Preferences, accelerator: Accelerator
) -> EncodedSet:
    """Return the preference set as latents and text embeddings; then move the frozen encoders off the
    accelerator.
    """
    check_frames(run.data, model)
    folder, rater = cache_of(run, accelerator)
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


def cache_of(run: Run | RewardRun, accelerator: Accelerator) -> tuple[str, RewardRater | None]:
    """Return the folder or address of a run's encoded set, and the rater of its images."""
    # no Path, which would damage an address ("s3://" becomes "s3:/")
    folder, rewards = run.data.cache_dir or str(Path(run.output) / "cache"), run.data.rewards
    scores = Folder(folder).local / "scores.sqlite"
    return folder, RewardRater(rewards, scores, str(accelerator.device)) if rewards else None


def check_frames(data: DataConfig, model: LoadedModel) -> None:
    """Raise a UserError for images with a video model, videos with an image model, or an unsupported size or
    number of frames.
    """
    check_kind(data, model)
    if not data.buckets:
        model.latent_shape(*size_of(data), data.frames or 1)


def check_kind(data: DataConfig, model: LoadedModel) -> None:
    """Raise a UserError for images with a video model, or videos with an image model."""
    if not model.codec.video and data.frames is not None:
        raise UserError(
            f"data.frames={data.frames}, but {model.family.name} is a model of images; allowed: null"
        )
    if model.codec.video and data.frames is None:
        raise UserError(
            f"data.frames is null, but {model.family.name} is a model of videos; allowed: such as "
            f"{model.usable_frames(17)} or {model.usable_frames(49)}"
        )


def diagnostics(
    run: Run, model: LoadedModel, held_out: EncodedSet, method: Method[Any], reference: Denoiser | None
) -> HeldOut:
    """Return the hook that measures held-out groups with the method without its strategies; batches are made
    when needed."""
    groups, seed = run.training.batch_size, run.training.seed
    batches = FixedBatches(held_out, model.family, run.data, groups, seed, guided(method))
    return HeldOut(
        batches,
        run.logging.diagnostics_every,
        run.logging.diagnostics_bins,
        seed=seed,
        span=span_of(model.path),
        method=method,
        reference=reference,
        groups=len(held_out),
    )


def guided(method: Method[Any]) -> bool:
    """Return whether a method needs guided predictions, and thus negative conditions."""
    return method.noising is not None and method.noising.guidance != 1


def pair_source(
    run: Run | RewardRun, learned: EncodedSet, model: LoadedModel, accelerator: Accelerator, guided: bool
) -> PairSource:
    """Return this rank's micro-batches of an encoded set, with negative conditions if ``guided``."""
    rank, world = group_of(run.training, accelerator)
    return PairSource(
        learned,
        model.family,
        run.data,
        run.training.batch_size,
        accumulation=run.training.accumulation,
        rank=rank,
        world=world,
        seed=run.training.seed,
        guided=guided,
    )
