"""The ``rollout`` section: sampling of a round of an online run, and its judges. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from diffalign.config.fields import (
    BATCH,
    BELOW_ONE,
    COUNT,
    COUNT_OR_ZERO,
    NAMES,
    PART,
    at_least,
    between,
    multiple,
    option,
)


@dataclass(frozen=True)
class RolloutConfig:
    """Online training: the samples of a round and their judges; a run without prompts is offline."""

    prompts: str = option("", "file of prompts, tiny:train, or a built-in list; empty: the run is offline")
    shape: Literal["auto", "samples", "trajectories", "tree"] = option(
        "auto",
        "contents of a round: what the method learns from (auto), finished samples, steps of whole "
        "trajectories, or a tree of rival steps",
    )
    prompts_per_round: int = option(8, "prompts of a round in each process", COUNT)
    samples: int = option(2, "samples of a prompt; in a tree: candidates at each branch", between(1, 2**16))
    shared_noise: bool = option(True, "the samples of a prompt start from one noise")
    steps: int = option(20, "steps of the sampler", between(1, 10**5))
    eta: float = option(
        1.0,
        "noise of each step: 1 is ancestral sampling; for a flow model the noise level of rollout.form",
        at_least(0),
    )
    form: Literal["sde", "cps", "dance"] = option(
        "sde", "noisy step of a flow model: Flow-GRPO's SDE or CPS, or DanceGRPO's"
    )
    density: Literal["gaussian", "squared"] = option(
        "gaussian",
        "of a flow model: what stands for a step's log-density: the Gaussian's, or minus its squared error "
        "without constants, as Flow-GRPO releases CPS (then with a smaller method.clip)",
    )
    window: int | None = option(
        None, "steps that are random and learnt from, the others follow the ODE (MixGRPO); null: all", COUNT
    )
    window_shift: int = option(
        25, "rounds after which the window moves along the trajectory; 0: it stays", COUNT_OR_ZERO
    )
    window_stride: int = option(1, "steps that the window moves by", COUNT)
    window_order: Literal["moving", "random"] = option(
        "moving", "random: each round draws the window's place anew (Flow-GRPO-Fast)"
    )
    window_within: int | None = option(
        None, "of window_order random: the first steps that the window lies among; null: all", COUNT
    )
    guidance: float = option(5.0, "scale of classifier-free guidance; 1: none", at_least(0))
    teachers: tuple[str, ...] = option(
        (),
        "of diffusion_opd: LoRAs, runs or pipeline folders of the model's family; several with the prompts "
        "that each teaches, a file of them first: ocr.txt=runs/ocr",
        NAMES,
    )
    reference_guidance: float | None = option(
        None, "of diffusion_opd: scale of guidance of the teachers; null: rollout.guidance", at_least(0)
    )
    batch_size: int = option(8, "samples in one call of the network; with guidance each counts twice", BATCH)
    resolution: int | None = option(None, "pixels of the images; null: data.resolution", multiple(8))
    trained_steps: float = option(
        1.0, "share of a trajectory's steps that are learnt from, drawn at random", PART
    )
    lowest_time: float = option(
        0.0, "steps that start below this time (0 data, 1 noise) are not learnt from", BELOW_ONE
    )
    passes: int = option(1, "number of times that a round is learnt from", COUNT)
    part: int | None = option(
        None,
        "samples of a prompt that are learnt from at once, by methods that take each by its advantage; "
        "null: all",
        COUNT,
    )
    first_branch: int = option(4, "in a tree: steps before its first branch", COUNT_OR_ZERO)
    inner_steps: int = option(
        0, "in a tree: steps that a candidate takes alone before it is judged", COUNT_OR_ZERO
    )
    threshold: float = option(
        0.0, "in a tree: best and worst are a tie below this difference of preference", BELOW_ONE
    )
    estimate: Literal["candidate", "parent", "none"] = option(
        "candidate",
        "in a tree: clean estimate that is judged: the network's at the candidate (published); parent: made "
        "of the prediction that the candidate was drawn with, one network call less; none: a latent_reward "
        "judges the noisy candidate itself, and nothing is decoded (LPO)",
    )
    rewards: tuple[str, ...] = option(
        (), "names of `diffalign rewards`, each with an optional weight: 0.5*pickscore", NAMES
    )
    combine: Literal["sum", "rank", "wins", "pareto"] = option("sum", "how several rewards become one score")
    normalise: Literal["none", "round", "group"] = option(
        "none",
        "scale each reward to mean 0 and standard deviation 1 before they are combined: over the round, or "
        "over the samples of a prompt (GDPO, with rollout.advantage batch)",
    )
    advantage: Literal[
        "none", "group", "group_std", "group_batch", "batch", "prompt", "raw", "best", "ends"
    ] = option(
        "none",
        "for methods that need one: a score relative to mean and standard deviation of its rivals, its "
        "batch, or its prompt over rounds; raw: the score itself; best, ends: the extremes of a group",
    )
    decoded_frames: int = option(
        128, "frames of videos that lie decoded in memory at once, whole videos; one always may", COUNT
    )
    decoder: str | None = option(
        None, "folder or hub id of a tiny autoencoder that decodes the images to be judged"
    )
    scoring: Literal["inline", "process"] = option(
        "inline",
        "process: a second process judges, batch_size at a time, while the policy samples on",
    )
    by: Literal["rewards", "people"] = option(
        "rewards", "judges of a round; people: a page in the browser asks for labels in each round"
    )
    page: bool = option(
        True, "by people: `diffalign train` serves the page; false: it stops until labels.jsonl is filled in"
    )
    page_port: int = option(8764, "of the page, on this machine alone; 0: a free one", between(0, 65535))
    keep: int = option(2, "rounds kept on disk; those that people label are all kept", COUNT)
