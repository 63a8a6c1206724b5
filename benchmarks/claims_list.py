"""The claims, and the comparisons that test them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from diffalign.config.io import shipped_configs
from diffalign.diffusion.inversion import Inversion
from diffalign.methods.dpo import DPO
from diffalign.plane.data import Maker, lists, preferences, with_flipped_labels
from diffalign.plane.plane import Plane
from diffalign.plane.settings import PLANE_METHODS, PlaneRow
from diffalign.strategies import wrap
from diffalign.types import Batch, Denoiser

Value = Literal["gain", "chosen", "rejected", "memory"]
STEPS = PlaneRow(DPO()).steps
FEW_STEPS = 30  # steps on the tiny SDXL: half of those of Diffusion-DPO on the leaderboard
NO_ROW = PlaneRow(DPO())


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a method in a world, with its settings.

    Attributes:
        name: name of its row; arms of equal names are the same.
        world: plane or tiny.
        title: title in the table.
        method: name in ``PLANE_METHODS``, or of a tiny recipe, that must exist.
        row: row of the plane; its ``data`` may be a variant.
        recipe: recipe of the tiny SDXL.
        flags: flags in addition to the recipe.
        steps: optimizer steps; None: those of the leaderboard's budget.
        tuned: on the plane, whether beta is tuned first, on another seed, for the largest gain on the
            support; at a fixed beta a gain shows the strength of the constraint, not the quality of the
            method.
        value: compared quantity: gain over the base, rise of the errors of held-out winners (chosen) or
            losers (rejected), or bytes.
    """

    name: str
    world: str
    title: str
    method: str
    row: PlaneRow = NO_ROW
    recipe: str = ""
    flags: tuple[str, ...] = ()
    steps: int | None = None
    tuned: bool = False
    value: Value = "gain"


@dataclass(frozen=True)
class Comparison:
    """The difference ``a`` minus ``b``, or of ``a`` and the base.

    Attributes:
        label: text in the table.
        a: first arm.
        b: second arm; None: the base.
        decides: whether the claim's verdict depends on it.
        lower: whether the claim is that the difference is below 0.
    """

    label: str
    a: Arm
    b: Arm | None = None
    decides: bool = False
    lower: bool = False

    @property
    def arms(self) -> Sequence[Arm]:
        """The arms, one or two."""
        return [self.a] if self.b is None else [self.a, self.b]

    @property
    def counted(self) -> bool:
        """Whether the value is counted once, so that there is no interval."""
        return self.a.value == "memory"


@dataclass(frozen=True)
class Claim:
    """A claim of a paper (``says``), and the comparisons that test it."""

    name: str
    title: str
    says: str
    comparisons: Sequence[Comparison]
    note: str = ""


def available(arm: Arm) -> bool:
    """Return whether the arm's method has settings in its world."""
    return (
        arm.method in PLANE_METHODS
        if arm.world == "plane"
        else f"tiny_sdxl_{arm.method}" in shipped_configs()
    )


def plane(method: str, variant: str = "", title: str = "", /, **changes: object) -> Arm:
    """Return an arm on the plane: a row of ``PLANE_METHODS`` with some fields changed."""
    steps, value = changes.pop("steps", None), changes.pop("value", "gain")
    tuned = changes.pop("tuned", False)
    row = replace(PLANE_METHODS.get(method, NO_ROW), **changes)  # type: ignore[arg-type]
    name = "-".join(filter(None, ("plane", method, variant, f"{steps}" if steps else "")))
    if value in ("chosen", "rejected"):
        name += "-errors"
    name += "-tuned" if tuned else ""
    given = {"steps": steps, "tuned": tuned, "value": value}
    return Arm(name, "plane", title or method, method, row, **given)  # type: ignore[arg-type]


def tiny(recipe: str, *flags: str, variant: str = "", title: str = "", steps: int | None = None) -> Arm:
    """Return an arm on the tiny SDXL: a recipe with flags."""
    name = "-".join(filter(None, ("tiny", recipe, variant, f"{steps}" if steps else "")))
    return Arm(name, "tiny", title or recipe, recipe, recipe=recipe, flags=flags, steps=steps)


def memory(recipe: str, train: str) -> Arm:
    """Return an arm whose value is the memory of one step."""
    name, flags = f"tiny-{recipe}-memory-{train}", (f"--model.train={train}",)
    return Arm(name, "tiny", recipe, recipe, recipe=recipe, flags=flags, value="memory")


@lru_cache
def flipped(share: float) -> Maker:
    """Return a maker of pairs with a share of the labels flipped; the reward model's scores are unchanged."""

    def maker(plane: Plane, base: Denoiser, seed: int = 0) -> Batch[Tensor]:
        return with_flipped_labels(preferences(plane, base, seed=seed), share, seed)

    maker.__name__ = f"preferences_{share:g}_turned_round"
    return maker


@lru_cache
def flipped_unrated(share: float) -> Maker:
    """Return the same without the reward model's scores."""

    def maker(plane: Plane, base: Denoiser, seed: int = 0) -> Batch[Tensor]:
        return replace(with_flipped_labels(preferences(plane, base, seed=seed), share, seed), extra={})

    maker.__name__ = f"preferences_{share:g}_turned_round_unrated"
    return maker


def by_reward(plane: Plane, base: Denoiser, seed: int = 0) -> Batch[Tensor]:
    """Return pairs labelled by the reward model alone, for methods that replace human labels by it."""
    batch = preferences(plane, base, seed=seed)
    return replace(batch, score=batch.extra["reward"])


def ends_of_lists(plane: Plane, base: Denoiser, seed: int = 0) -> Batch[Tensor]:
    """Return the best and the worst of each list, scored 1 and 0."""
    batch = lists(plane, base, seed=seed)
    by_list = batch.score.reshape(batch.num_groups, -1)
    first = torch.arange(batch.num_groups) * by_list.shape[1]
    index = first[:, None] + torch.stack([by_list.argmax(1), by_list.argmin(1)], 1)
    group = torch.arange(batch.num_groups).repeat_interleave(2)
    score = torch.tensor([1.0, 0.0]).repeat(batch.num_groups)
    return replace(batch.select(index.flatten()), group=group, score=score)


INVERSIONS = {
    "": ("inpo", None),
    "reference20": ("inpo, 20 steps", Inversion(steps=20, eta=0.1, by="reference")),
    "policy10": ("inpo, by the policy", Inversion(steps=10, mode="paper", eta=0.1)),
}
"""How InPO inverts on the plane, by variant: its row's settings (reference, 5 steps), and two others."""


def _inpo() -> Claim:
    comparisons = []
    for share in (0.25, 0.5, 1.0):
        same = {"steps": round(STEPS * share), "rate": NO_ROW.rate, "groups": NO_ROW.groups, "tuned": True}
        for variant, (title, noising) in INVERSIONS.items():
            method = {"method": replace(PLANE_METHODS["inpo"].method, noising=noising)} if noising else {}
            at = f"after {share:.0%} of DPO's steps"
            arms = plane("inpo", variant, title, **method, **same), plane("dpo", **same)
            comparisons.append(Comparison(at, *arms, decides=share == 0.25))
    comparisons += [
        Comparison(f"after {n} steps", tiny("inpo", steps=n), tiny("dpo", steps=n), decides=n == 15)
        for n in (15, 30)
    ]
    note = (
        "Equal steps, groups and learning rate, each method with its own beta; InPO's steps cost more (see "
        "the leaderboard for equal compute). *inpo* of the plane inverts by the reference in 5 steps, with "
        "0.5 of the posterior noise: the settings of its row there, chosen since states that the policy "
        "inverts drift with it. *20 steps* is the reference with more steps and 0.1 of the noise; *by the "
        "policy* is the released code's inversion, 10 steps that end on the grid, by the network that is "
        "trained, 0.1 of the noise. On the tiny SDXL it inverts by the policy in 10 steps that end at the "
        "sampled time."
    )
    return Claim("inpo", "InPO", "gets further than Diffusion-DPO in fewer steps", comparisons, note)


def _smpo() -> Claim:
    comparisons = []
    for share in (0.0, 0.2, 0.4):
        at = f"{share:.0%} of the labels turned round"
        same = {"steps": STEPS, "rate": NO_ROW.rate, "groups": NO_ROW.groups, "tuned": True}
        dpo = plane("dpo", f"flip{share:g}", data=flipped(share), **same)
        smpo = plane("smpo", f"flip{share:g}", data=flipped(share), **same)
        unrated = plane(
            "smpo", f"flip{share:g}-unrated", "smpo, labels only", data=flipped_unrated(share), **same
        )
        rewarded = plane("dpo", "by-reward", "dpo, the reward's labels", data=by_reward, **same)
        comparisons += [
            Comparison(at, smpo, rewarded, decides=share > 0),
            Comparison(at, unrated, dpo),
            Comparison(at, smpo, dpo),
        ]
    for share in (0.2, 0.4):
        flag, at = f"--data.flip_labels={share}", f"{share:.0%} of the labels turned round"
        smpo, dpo = (tiny(m, flag, variant=f"flip{share:g}", steps=FEW_STEPS) for m in ("smpo", "dpo"))
        judged = ("--data.rewards=judge", "--data.rewards_as=score")
        rewarded = tiny(
            "dpo", *judged, variant="by-reward", title="dpo, the reward's labels", steps=FEW_STEPS
        )
        comparisons += [Comparison(at, smpo, rewarded, decides=True), Comparison(at, smpo, dpo)]
    note = (
        "SmPO takes winner and label from a reward model, which nobody turned round; the person's label only "
        "says what is a tie. So what decides is SmPO against Diffusion-DPO where both know the same: *the "
        "reward's labels* is Diffusion-DPO on pairs that the same reward model has ordered, and *labels "
        "only* is SmPO without a reward model, smoothing and inversion alone. SmPO against Diffusion-DPO on "
        "the labels that were turned round is what the paper compares; there the reward model makes the "
        "difference."
    )
    return Claim("smpo", "SmPO", "holds up under wrong labels better than Diffusion-DPO", comparisons, note)


def _rankdpo() -> Claim:
    row = PLANE_METHODS.get("rankdpo", NO_ROW)
    same = {"steps": STEPS, "rate": row.rate, "groups": row.groups, "tuned": True}
    rank = plane("rankdpo", **same)
    as_rankdpo = ("--data.path=tiny:lists", "--training.batch_size=32")  # as in its recipe
    comparisons = [
        Comparison(
            "against DPO on all six pairs of the same images",
            rank,
            plane("dpo", "lists", "dpo, all pairs", data=lists, **same),
            decides=True,
        ),
        Comparison(
            "against DPO on the best and the worst of the four",
            rank,
            plane("dpo", "ends", "dpo, best and worst", data=ends_of_lists, **same),
        ),
        Comparison(
            "against DPO on all six pairs of the same images",
            tiny("rankdpo"),
            tiny("dpo", *as_rankdpo, variant="lists", title="dpo, all pairs"),
            decides=True,
        ),
    ]
    return Claim("rankdpo", "RankDPO", "beats Diffusion-DPO on the same images, four a prompt", comparisons)


def _mapo() -> Claim:
    peak = "peak of a step and weights, MiB"
    full, lora = ((memory("mapo", train), memory("dpo", train)) for train in ("full", "lora"))
    comparisons = [
        Comparison("gain over the base", plane("mapo"), decides=True),
        Comparison("gain over the base", tiny("mapo"), decides=True),
        Comparison(f"full fine-tuning: {peak}", *full, decides=True, lower=True),
        Comparison(f"LoRA: {peak}", *lora, lower=True),
    ]
    note = (
        "Held samples are those that a reference is asked about. Under LoRA the reference is the same "
        "network with its adapters off, so no second set of weights is held."
    )
    return Claim("mapo", "MaPO", "needs no reference and less memory", comparisons, note)


def _kto() -> Claim:
    comparisons = [Comparison("gain over the base", arm("kto"), decides=True) for arm in (plane, tiny)]
    return Claim("kto", "Diffusion-KTO", "learns from single likes", comparisons)


def _sdpo() -> Claim:
    comparisons = []
    for beta in (100.0, 20.0):
        method = DPO(beta=beta)
        safe = wrap(method, [{"type": "sdpo", "mu": 0.9}])
        arms: dict[str, tuple[Arm, Arm]] = {}
        for value in ("rejected", "chosen", "gain"):
            arms[value] = (
                plane("dpo", f"beta{beta:g}-sdpo", "dpo with sdpo", method=safe, steps=STEPS, value=value),
                plane("dpo", f"beta{beta:g}", "dpo", method=method, steps=STEPS, value=value),
            )
        losers, winners, gain = arms["rejected"], arms["chosen"], arms["gain"]
        comparisons += [
            Comparison(f"beta {beta:g}: rise of losers' errors, / 1000", *losers, decides=True, lower=True),
            Comparison(f"beta {beta:g}: rise of winners' errors, / 1000", *winners, lower=True),
            Comparison(f"beta {beta:g}: gain", *gain),
        ]
    best = [
        plane("dpo", "sdpo", "dpo with sdpo", method=safe, steps=STEPS, tuned=True),
        plane("dpo", steps=STEPS, tuned=True),
    ]
    comparisons.append(Comparison("gain, each with its own beta", *best))
    return Claim("sdpo", "Diffusion-SDPO", "lowers the blow-up of the losers' errors", comparisons)


def _spo() -> Claim:
    d3po, spo = PLANE_METHODS["d3po"], PLANE_METHODS["spo"]
    points = 12 * 96 * 4  # twelve rounds of 96 prompts, four points each
    on_plane = [
        plane("spo", "points", steps=12 * spo.round_steps),
        plane("d3po", "points", steps=12 * d3po.round_steps),
    ]
    # 2560 images: ten rounds of 64 prompts and five slots, twenty rounds of 32 prompts and seven
    step_aware = ("--rollout.rewards=step_aware:tiny",)
    on_tiny = [tiny("spo", steps=50), tiny("d3po", *step_aware, variant="step-aware", steps=140)]
    parent = tiny("spo", "--rollout.estimate=parent", variant="parent", title="spo, by the parent", steps=50)
    comparisons = [
        Comparison(f"{points:,} points", on_plane[0], on_plane[1], decides=True),
        Comparison("2,560 images, both by the step-aware model", on_tiny[0], on_tiny[1], decides=True),
        Comparison("2,560 images, judged without calls of the network", parent, on_tiny[0]),
    ]
    note = (
        "Equal finished samples, not equal compute: SPO asks its network about candidates that it does not "
        "go on with, D3PO learns from more steps of each. On the plane both are judged by the height; on the "
        "tiny SDXL both learn from the step-aware model, and the judge is not trained on. *By the parent*: "
        "`rollout.estimate: parent` (ours), 31 % of the published loop's network samples at k = 4."
    )
    return Claim("spo", "SPO", "gets further than D3PO on as many sampled images", comparisons, note)


def CLAIMS() -> list[Claim]:  # noqa: N802
    """Return every claim, with the current settings of the methods."""
    return [_inpo(), _smpo(), _rankdpo(), _mapo(), _kto(), _sdpo(), _spo()]
