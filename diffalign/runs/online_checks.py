"""Checks of an online run before a model is loaded."""

from diffalign.config.schema import RolloutConfig, Run
from diffalign.data.prompts.prompt_sets import read_prompts
from diffalign.errors import UserError
from diffalign.methods import REGISTRY
from diffalign.methods.registry import OFFLINE_ONLY, DataKind, shape_of
from diffalign.rewards.ensemble import judges_edits
from diffalign.rewards.specs import all_weighted
from diffalign.rewards.zoo.edits import edits_of
from diffalign.rollout.advantages import KINDS
from diffalign.runs.reward_gradients import check_distillation, check_gradients
from diffalign.runs.teachers import check_teachers


def check_online(run: Run) -> list[str]:
    """Check the settings of an online run; return its prompts, none of an offline run.

    Raises:
        UserError: a method that has no offline form without prompts, or rollout settings that do not fit.
    """
    config, name = run.rollout, run.method["type"]
    if not config.prompts:
        card = REGISTRY[name]
        if card.rollout != "samples" or card.advantages or card.by_reference:
            raise UserError(
                f"method {name} learns from rollouts, but rollout.prompts is empty; give a file of prompts, "
                "tiny:train, or a built-in list"
            )
        return []
    shape = shape_of(name, config)
    if REGISTRY[name].beside and not run.data.path:
        raise UserError(
            f"method {name} learns from real samples beside what it draws, and data.path is empty; "
            "allowed: a set of preferences or of liked images"
        )
    _check_size(run)
    if run.data.frames is not None:
        _check_videos(run, shape)
    _check_data(run)
    prompts = read_prompts(config.prompts)
    if shape == "distillation":
        check_distillation(run)
        return prompts
    check_teachers(run, prompts)
    taught = REGISTRY[name].taught
    if config.by == "rewards" and not config.rewards and not taught:
        raise UserError(
            "rollout.rewards is empty; allowed: names of `diffalign rewards`, or rollout.by people"
        )
    if config.by == "rewards":
        for reward in all_weighted(config.rewards) if config.rewards else ():
            if judges_edits(reward.spec):
                edits_of(reward.name, prompts)
    if shape == "gradients":
        check_gradients(run)
        return prompts
    if shape != "samples" and run.strategies:
        raise UserError(
            f"strategies with method {name}: they work on denoising errors, and it learns from rollouts; "
            "allowed with it: none"
        )
    if shape == "tree":
        _check_tree(run)
    if config.estimate == "none" and (shape, config.scoring, config.decoder) != ("tree", "inline", None):
        raise UserError(
            "rollout.estimate='none' scores the noisy candidates of a tree in this process, and nothing is "
            "decoded; allowed with it: rollout.shape tree, rollout.scoring inline, no rollout.decoder"
        )
    if shape != "samples" and not config.eta and not taught:
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
    _check_part(run)
    if config.samples < 2 and config.advantage == "none" and not taught:
        raise UserError(f"rollout.samples={config.samples}: no rivals to compare; allowed: 2 or more")
    if config.by == "people" and (shape == "tree" or config.advantage != "none"):
        raise UserError(
            "rollout.by='people' labels finished images; allowed with it: shapes samples and trajectories, "
            "rollout.advantage none"
        )
    return prompts


def _check_scores(run: Run, shape: str) -> None:
    """Check that advantages and Pareto comparison are used by methods that can."""
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
            f"rollout.combine='pareto' with method {card.name}, which needs one score a sample; allowed:  "
            "sum, wins, rank"
        )


def _check_size(run: Run) -> None:
    """Check that one place says how large samples are."""
    side, data = run.rollout.resolution, run.data
    if side and (data.height or data.width):
        raise UserError(
            f"rollout.resolution={side} with data.height={data.height} and data.width={data.width}, which "
            "samples have as well; allowed: either"
        )


def _check_videos(run: Run, shape: str) -> None:
    """Check what is not done with videos."""
    config, where = run.rollout, f"with data.frames={run.data.frames}"
    if shape in ("gradients", "distillation"):
        raise UserError(
            f"method {run.method['type']} {where}: it samples images; allowed: data.frames null, or a method "
            "that learns from finished samples or from recorded steps (`diffalign methods`)"
        )
    for name, value, allowed, why in (
        ("by", config.by, "rewards", "the page for labels shows images"),
        ("scoring", config.scoring, "inline", "a process of rewards is sent images"),
        ("decoder", config.decoder, None, "tiny autoencoders are of images"),
    ):
        if value != allowed:
            raise UserError(f"rollout.{name}={value!r} {where}: {why}; allowed: {allowed or 'null'}")


def _check_data(run: Run) -> None:
    """Check that the method learns from data that a rollout can give: samples with scores."""
    name, config = run.method["type"], run.rollout
    data = REGISTRY[name].data
    if data in OFFLINE_ONLY:
        raise UserError(
            f"method {name} learns from {data}, which a rollout does not give; allowed: data.path"
        )
    if data is DataKind.LIKES and config.by == "rewards" and config.combine not in ("wins", "rank"):
        raise UserError(
            f"rollout.combine={config.combine!r} with method {name}: a score above 0.5 is a like; allowed: "
            "wins or rank (shares of won comparisons), or rollout.by people"
        )


def _check_part(run: Run) -> None:
    """Check that ``rollout.part`` splits the samples of a prompt only where the method allows it."""
    config, card = run.rollout, REGISTRY[run.method["type"]]
    if config.part is None:
        return
    if not card.advantages or card.whole:
        raise UserError(
            f"rollout.part={config.part} with method {card.name}, which compares the samples of a prompt; "
            "allowed: null"
        )
    if config.samples % config.part:
        raise UserError(f"rollout.part={config.part}; allowed: a divisor of rollout.samples={config.samples}")


def _check_window(config: RolloutConfig, shape: str) -> None:
    """Check that a window has the same number of steps wherever it is."""
    if config.window_within is not None and (config.window is None or config.window_order != "random"):
        raise UserError(
            f"rollout.window_within={config.window_within}, which only a window in order random reads; "
            "allowed: null, or rollout.window and rollout.window_order random"
        )
    if config.window is None:
        return
    if shape == "tree":
        raise UserError(f"rollout.window={config.window} with a tree, which branches; allowed: null")
    if config.lowest_time:
        raise UserError(
            f"rollout.lowest_time={config.lowest_time} with rollout.window={config.window}; allowed: 0"
        )
    if config.window_within is not None and not config.window <= config.window_within < config.steps:
        raise UserError(
            f"rollout.window_within={config.window_within}; allowed: from rollout.window={config.window} to "
            f"less than rollout.steps={config.steps}, or null"
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
        raise UserError("rollout.combine='pareto' has no best and worst for a tree; allowed: sum, wins, rank")
    if config.advantage != "none":
        raise UserError(
            f"rollout.advantage={config.advantage!r} with a tree, whose rivals differ from step to step; "
            "allowed: none, or rollout.shape trajectories"
        )
    if config.samples < 2:
        raise UserError(f"rollout.samples={config.samples}; allowed for a tree: 2 or more candidates")
