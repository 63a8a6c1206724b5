"""The online part of a job: it builds the source that samples, scores and yields batches from a run's rollout
section.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from diffalign.config.schema import Run
from diffalign.diffusion.samplers import kernel_for
from diffalign.diffusion.spans import ALL, span_of
from diffalign.errors import UserError
from diffalign.evaluation.drawing.sampling import FPS
from diffalign.methods import REGISTRY, build
from diffalign.methods._trailing import Trailing, TrailingSampler
from diffalign.methods.registry import shape_of
from diffalign.models.decoder import load_decoder
from diffalign.models.loaded import LoadedModel
from diffalign.models.precision import AUTOCAST
from diffalign.rollout.judges import judge_of
from diffalign.rollout.model import PipelineRolloutModel
from diffalign.rollout.rounds import Plan
from diffalign.rollout.setting import Setting, window_of
from diffalign.rollout.shapes import drawn_steps
from diffalign.rollout.source import OnlineSource, SamplingRoles
from diffalign.rollout.store import RoundStore
from diffalign.runs.roles import Roles
from diffalign.runs.teachers import taught_by
from diffalign.training.acceleration import Accelerator
from diffalign.types import Method, Reward
from diffalign.types import Path as NoisingPath
from diffalign.utils.files import write_atomic
from diffalign.utils.text import read_json_object


@runtime_checkable
class Sampled(Protocol):
    """The parts of a model that a plan needs; a ``LoadedModel`` has them."""

    @property
    def path(self) -> NoisingPath:
        """Its noising path."""
        ...

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Of an image or a video, without the batch axis."""
        ...

    def grid(self, steps: int, shape: tuple[int, ...]) -> Tensor:
        """Return the times of its stock sampler."""
        ...


def online_source(
    run: Run,
    model: LoadedModel,
    roles: Roles,
    method: Method[Any],
    accelerator: Accelerator,
    *,
    fresh: bool,
    load: Callable[[str, str], Reward],
    prompts: Sequence[str],
    check: Callable[[Tensor], None] = lambda scores: None,
) -> OnlineSource:
    """Return the source of an online run.

    Args:
        run: the run.
        model: the loaded pipeline.
        roles: policy, reference and sampler.
        method: the method with its strategies.
        accelerator: of this process.
        fresh: whether the run starts without a checkpoint.
        load: a reward of a spec on a device.
        prompts: those of ``check_online``.
        check: gets the scores of a round before anything is learned from them.

    Raises:
        UserError: rewards or batch sizes that do not fit.
    """
    config, shape = run.rollout, shape_of(run.method["type"], run.rollout)
    if config.by == "people" and accelerator.num_processes > 1:
        raise UserError("rollout.by='people' with several processes; allowed: one process")
    plan = plan_of(run, model, accelerator.process_index, accelerator.num_processes)
    _check_windows(run, plan)
    folder = Path(run.output) / "rollouts"
    if accelerator.is_main_process:
        _claim(run, folder, fresh, [accelerator.num_processes, list(prompts)])
    accelerator.wait_for_everyone()
    if config.decoder and model.data_std != 1:
        raise UserError(
            f"rollout.decoder={config.decoder!r} with a model of EDM's preconditioning, whose latents have "
            "another scale; allowed: null"
        )
    decoder = config.decoder and load_decoder(config.decoder, model.device)
    if config.estimate == "none":  # latents are scored
        decoder = _as_they_are
    return OnlineSource(
        _sampling_roles(run, model, roles, method),
        PipelineRolloutModel(
            model,
            run.size,
            decoder=decoder or None,
            frames=run.data.frames,
            decoded_frames=config.decoded_frames,
        ),
        judge_of(config, str(accelerator.device), load, rate_of(run), prompts),
        prompts,
        config=config,
        shape=shape,
        setting=setting_of(run, model),
        plan=plan,
        seed=run.training.seed,
        store=RoundStore(folder, accelerator.process_index, 0 if config.by == "people" else config.keep),
        check=check,
    )


def _sampling_roles(run: Run, model: LoadedModel, roles: Roles, method: Method[Any]) -> SamplingRoles:
    """Return who samples: of two experts the trained one and the other, each at its times."""
    whole = partial(model.sampler, autocast=AUTOCAST[run.training.mixed_precision])
    policy = whole(roles.sampler or roles.policy_of(roles.network))
    if roles.teachers:
        return SamplingRoles(policy, taught_by(run, roles.teachers), roles.network)
    return SamplingRoles(policy, whole(roles.reference) if method.needs_reference else None, roles.network)


def rate_of(run: Run) -> float | None:
    """Return the frames a second of what a run samples, as its validation writes them; None for images."""
    return None if run.data.frames is None else run.data.fps or FPS


def _as_they_are(latents: Tensor) -> Tensor:
    return latents


def plan_of(run: Run, model: Sampled, rank: int = 0, world: int = 1) -> Plan:
    """Return the split of rounds into micro-steps: the number of slots depends on which steps are
    stochastic."""
    config, shape, setting = run.rollout, shape_of(run.method["type"], run.rollout), setting_of(run, model)
    draws = drawn_steps(setting, model.path, setting.first_branch if shape == "tree" else 0)
    if shape != "samples" and not draws and setting.own is not None:
        low, high = span_of(setting.own)
        raise UserError(
            f"rollout.steps={config.steps}: none of the steps to learn from begins at the times {low:g} to "
            f"{high:g} of model.expert={run.model.expert}; allowed: more, or the other expert"
        )
    if shape != "samples" and not draws:
        raise UserError(f"rollout.lowest_time={config.lowest_time}: no step is left; allowed: less")
    slots = 1 if shape == "samples" else max(1, round(config.trained_steps * draws))
    slots *= config.samples // (config.part or config.samples)
    return Plan(config.prompts_per_round, slots, run.training.batch_size, config.passes, rank, world)


def setting_of(run: Run, model: Sampled) -> Setting:
    """Return how a run samples with a model: at the times of its stock sampler."""
    config = run.rollout
    return Setting(
        kernel_for(model.path, config.eta, config.form, config.density),
        model.grid(config.steps, model.latent_shape(*run.size, run.data.frames or 1)),
        config.guidance,
        config.samples,
        config.shared_noise,
        config.first_branch,
        config.inner_steps,
        config.estimate,
        config.lowest_time,
        window_of(config, run.training.seed),
        at_once=config.batch_size,
        means=REGISTRY[run.method["type"]].means,
        by_reference=REGISTRY[run.method["type"]].by_reference,
        taught=REGISTRY[run.method["type"]].taught,
        reference_guidance=config.reference_guidance,
        own=None if span_of(model.path) == ALL else model.path,
    )


def steps_of_a_round(run: Run, plan: Plan) -> int:
    """Return the number of optimizer steps on one round."""
    return plan.micro_steps // run.training.accumulation


def _check_windows(run: Run, plan: Plan) -> None:
    """Check that a round is a whole number of optimizer steps and that checkpoints are made between rounds:
    only then can a killed run sample the same round again.
    """
    if plan.micro_steps % run.training.accumulation:
        raise UserError(
            f"training.accumulation={run.training.accumulation}; allowed: a divisor of the "
            f"{plan.micro_steps} micro-batches of a round"
        )
    steps = steps_of_a_round(run, plan)
    if run.checkpoint.every % steps:
        raise UserError(
            f"checkpoint.every={run.checkpoint.every}; allowed: a multiple of the {steps} optimizer steps of "
            f"a round, such as {-(-run.checkpoint.every // steps) * steps}, so that a run that is killed can "
            "sample its round again"
        )
    if run.training.reference_every % steps:
        raise UserError(
            f"training.reference_every={run.training.reference_every}; allowed: 0, or a multiple of the "
            f"{steps} optimizer steps of a round, whose steps are compared with the reference of its sampling"
        )
    method = build(run.method)
    role = REGISTRY[run.method["type"]].trailing
    trail, place = None, "trail"
    if role == "sampler" and isinstance(method, Trailing):
        trail = method.trail
    elif role == "both" and isinstance(method, TrailingSampler):
        trail, place = method.sampler_trail, "sampler_trail"
    if trail is not None:
        every = trail.every
        if every % steps:
            raise UserError(
                f"method.{place}.every={every}; allowed: a multiple of the {steps} optimizer steps of a "
                "round, which the moving average has sampled: it must not move before they are taken"
            )


def _claim(run: Run, folder: Path, fresh: bool, facts: list[Any]) -> None:
    """Claim the folder of rounds for this run: rounds of another run are removed, or refused if people
    labelled them.

    A run is another one if its settings differ, or ``facts``: its prompts and its number of processes.
    """
    identity = json.dumps([_identity(run), facts], sort_keys=True, default=str)
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    mark = folder / "run.json"
    same = mark.is_file() and read_json_object(mark).get("settings") == digest
    if fresh and folder.exists() and (run.overwrite or not same):
        if list(folder.glob("*round-*/labels*.jsonl")) and not run.overwrite:
            raise UserError(
                f"{folder} holds labels of a run with other settings; write over it with --overwrite true, "
                "or choose another --output"
            )
        shutil.rmtree(folder)
    write_atomic(mark, json.dumps({"settings": digest}))


def _identity(run: Run) -> dict[str, Any]:
    """Return the settings that samples depend on, without those of output and logging."""
    kept = replace(run, output="", resume=None, overwrite=False)
    everything = cast(dict[str, Any], asdict(kept))
    for name in ("logging", "checkpoint", "validation"):
        del everything[name]
    return everything
