"""The online half of a job: from a run's rollout section to the source that samples, is judged and gives
batches.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from diffalign.config import RolloutConfig, Run
from diffalign.data.prompts import read_prompts
from diffalign.errors import UserError
from diffalign.files import write_atomic
from diffalign.methods import REGISTRY
from diffalign.models.decoder import load_decoder
from diffalign.models.loaded import LoadedModel
from diffalign.players import Players
from diffalign.rollout.advantages import KINDS
from diffalign.rollout.judges import judge_of
from diffalign.rollout.rounds import Plan
from diffalign.rollout.shapes import Setting, Window, drawn_steps
from diffalign.rollout.source import Cast, OnlineSource
from diffalign.rollout.store import RoundStore
from diffalign.rollout.studio import ModelStudio
from diffalign.samplers import kernel_for
from diffalign.training.acceleration import Accelerator
from diffalign.types import Path as NoisingPath
from diffalign.types import Reward


class Sampled(Protocol):
    """What a plan needs of a model: a ``LoadedModel`` is one."""

    @property
    def path(self) -> NoisingPath:
        """Its noising path."""
        ...

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Of an image, without the batch axis."""
        ...

    def grid(self, steps: int, shape: tuple[int, ...]) -> Tensor:
        """The times of its stock sampler."""
        ...


def shape_of(run: Run) -> str:
    """What a round is made of: what the method learns from, unless the run names it."""
    wanted, named = REGISTRY[run.method["type"]].rollout, run.rollout.shape
    if named == "auto":
        return wanted
    if (wanted == "samples") != (named == "samples"):
        raise UserError(
            f"rollout.shape={named!r} with method {run.method['type']}, which learns from {wanted}; allowed: "
            + ("samples" if wanted == "samples" else "trajectories, tree")
        )
    return named


def check_online(run: Run) -> list[str]:
    """The prompts of an online run, none of an offline one, and what can be told before a model is loaded.

    Raises:
        UserError: a method that has no offline form without prompts, or rollout settings that do not fit.
    """
    config, name = run.rollout, run.method["type"]
    if not config.prompts:
        if REGISTRY[name].rollout != "samples" or REGISTRY[name].advantages:
            raise UserError(
                f"method {name} learns from rollouts, but rollout.prompts is empty; give a file of prompts, "
                "tiny:train, or a built-in list"
            )
        return []
    shape = shape_of(run)
    _check_data(run)
    prompts = read_prompts(config.prompts)
    if config.by == "rewards" and not config.rewards:
        raise UserError(
            "rollout.rewards is empty; allowed: names of `diffalign rewards`, or rollout.by people"
        )
    if shape != "samples" and run.strategies:
        raise UserError(
            f"strategies with method {name}: they work on denoising errors, and it learns from rollouts; "
            "allowed with it: none"
        )
    if shape == "tree":
        _check_tree(run)
    if shape != "samples" and not config.eta:
        raise UserError(
            f"rollout.eta={config.eta}: steps without noise have no density; allowed with method {name}: "
            "more than 0"
        )
    if shape == "samples" and not config.eta and config.shared_noise:
        raise UserError(
            "rollout.shared_noise=True with rollout.eta=0: all samples of a prompt would be one; allowed: "
            "rollout.shared_noise false, or rollout.eta above 0"
        )
    _check_window(config, shape)
    _check_scores(run, shape)
    if config.samples < 2 and config.advantage == "none":
        raise UserError(f"rollout.samples={config.samples}: nobody to be compared with; allowed: 2 or more")
    if config.by == "people" and (shape == "tree" or config.advantage != "none"):
        raise UserError(
            "rollout.by='people' labels finished images; allowed with it: shapes samples and trajectories, "
            "rollout.advantage none"
        )
    return prompts


def _check_scores(run: Run, shape: str) -> None:
    """Advantages for whom they are meant, and Pareto for whoever can compare by it."""
    config, card = run.rollout, REGISTRY[run.method["type"]]
    if card.advantages != (config.advantage != "none"):
        raise UserError(
            f"rollout.advantage={config.advantage!r} with method {card.name}, which learns from "
            + (
                f"advantages; allowed: {', '.join(KINDS)}"
                if card.advantages
                else "comparisons; allowed: none"
            )
        )
    if config.combine == "pareto" and (shape == "samples" or card.advantages):
        raise UserError(
            f"rollout.combine='pareto' with method {card.name}, which wants one score a sample; allowed: "
            "sum, wins"
        )


def _check_data(run: Run) -> None:
    """What a method learns from must be what samples with scores can be."""
    name, config = run.method["type"], run.rollout
    data = REGISTRY[name].data
    if data in ("captions", "pairs with patch maps", "demonstrations"):
        raise UserError(
            f"method {name} learns from {data}, which a rollout does not give; allowed: data.path"
        )
    if data == "likes" and config.by == "rewards" and config.combine != "wins":
        raise UserError(
            f"rollout.combine={config.combine!r} with method {name}: a score above 0.5 is a like; allowed: "
            "wins (the share of won comparisons), or rollout.by people"
        )


def _check_window(config: RolloutConfig, shape: str) -> None:
    """A window has the same number of steps wherever it is."""
    if config.window is None:
        return
    if shape == "tree":
        raise UserError(f"rollout.window={config.window} with a tree, which branches; allowed: null")
    if config.lowest_time:
        raise UserError(
            f"rollout.lowest_time={config.lowest_time} with rollout.window={config.window}; allowed: 0"
        )
    if config.window >= config.steps:
        raise UserError(
            f"rollout.window={config.window}; allowed: less than rollout.steps={config.steps}, or null"
        )


def _check_tree(run: Run) -> None:
    config = run.rollout
    if config.first_branch >= config.steps:
        raise UserError(
            f"rollout.first_branch={config.first_branch}; allowed: less than rollout.steps={config.steps}"
        )
    if config.combine == "pareto":
        raise UserError("rollout.combine='pareto' has no best and worst for a tree; allowed: sum, wins")
    if config.advantage != "none":
        raise UserError(
            f"rollout.advantage={config.advantage!r} with a tree, whose rivals differ from step to step; "
            "allowed: none, or rollout.shape trajectories"
        )
    if config.samples < 2:
        raise UserError(f"rollout.samples={config.samples}; allowed for a tree: 2 or more candidates")


def online_source(
    run: Run,
    model: LoadedModel,
    who: Players,
    method: Any,
    accelerator: Accelerator,
    fresh: bool,
    load: Callable[[str, str], Reward],
    prompts: Sequence[str],
) -> OnlineSource:
    """The source of an online run.

    Args:
        run: the run.
        model: the loaded pipeline.
        who: who plays.
        method: what learns.
        accelerator: of this process.
        fresh: whether no checkpoint is continued.
        load: a reward of a spec on a device.
        prompts: what ``check_online`` has read.

    Raises:
        UserError: rewards or batch sizes that do not fit.
    """
    config, shape = run.rollout, shape_of(run)
    if config.by == "people" and accelerator.num_processes > 1:
        raise UserError("rollout.by='people' with several processes; allowed: one process")
    plan = plan_of(run, model, accelerator.process_index, accelerator.num_processes)
    _check_windows(run, plan)
    folder = Path(run.output) / "rollouts"
    if accelerator.is_main_process:
        _claim(run, folder, fresh, [accelerator.num_processes, list(prompts)])
    accelerator.wait_for_everyone()
    decoder = config.decoder and load_decoder(config.decoder, model.device)
    return OnlineSource(
        Cast(who.policy_of(model.network), who.reference if method.needs_reference else None, model.network),
        ModelStudio(model, config.resolution or run.data.resolution, decoder=decoder or None),
        judge_of(config, str(accelerator.device), load),
        prompts,
        config,
        shape,
        setting_of(run, model),
        plan,
        run.training.seed,
        RoundStore(folder, accelerator.process_index, 0 if config.by == "people" else config.keep),
    )


def plan_of(run: Run, model: Sampled, rank: int = 0, world: int = 1) -> Plan:
    """Who learns what when of a model: how many slots a prompt has depends on which steps are draws."""
    config, shape, setting = run.rollout, shape_of(run), setting_of(run, model)
    draws = drawn_steps(setting, model.path, setting.first_branch if shape == "tree" else 0)
    if shape != "samples" and not draws:
        raise UserError(f"rollout.lowest_time={config.lowest_time}: no step is left; allowed: less")
    slots = 1 if shape == "samples" else max(1, round(config.trained_steps * draws))
    return Plan(config.prompts_per_round, slots, run.training.batch_size, config.passes, rank, world)


def setting_of(run: Run, model: Sampled) -> Setting:
    """How a run samples with a model: at the times of its stock sampler."""
    config, side = run.rollout, run.rollout.resolution or run.data.resolution
    window = config.window and Window(config.window, config.window_shift, config.window_stride)
    return Setting(
        kernel_for(model.path, config.eta, config.form),
        model.grid(config.steps, model.latent_shape(side, side)),
        config.guidance,
        config.samples,
        config.shared_noise,
        config.first_branch,
        config.inner_steps,
        config.estimate,
        config.lowest_time,
        window or None,
    )


def steps_of_a_round(run: Run, plan: Plan) -> int:
    """Optimizer steps that are taken on one round."""
    return plan.micro_steps // run.training.accumulation


def _check_windows(run: Run, plan: Plan) -> None:
    """A round must be whole optimizer steps, and checkpoints must stand between rounds: only then can a run
    that is killed sample again what it had sampled.
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
            f"{steps} optimizer steps of a round, whose steps are held against the reference of its sampling"
        )


def _claim(run: Run, folder: Path, fresh: bool, facts: list[Any]) -> None:
    """Make the folder of rounds this run's own: what another run has left there goes, or is refused.

    A run is another one if its settings are, or ``facts``: its prompts, and how many processes share them.
    """
    identity = json.dumps([_identity(run), facts], sort_keys=True, default=str)
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    mark = folder / "run.json"
    same = mark.is_file() and json.loads(mark.read_text(encoding="utf-8"))["settings"] == digest
    if fresh and folder.exists() and (run.overwrite or not same):
        if list(folder.glob("*round-*/labels*.jsonl")) and not run.overwrite:
            raise UserError(
                f"{folder} holds labels of a run with other settings; write over it with --overwrite true, "
                "or choose another --output"
            )
        shutil.rmtree(folder)
    write_atomic(mark, json.dumps({"settings": digest}))


def _identity(run: Run) -> dict[str, Any]:
    """What decides what is sampled; not where it is written, nor how often something is logged."""
    kept = replace(run, output="", resume=None, overwrite=False)
    everything = cast(dict[str, Any], asdict(kept))
    for name in ("logging", "checkpoint", "validation"):
        del everything[name]
    return everything
