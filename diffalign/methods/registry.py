"""Registry of the methods: the modules of the package with a ``CARD``; listing them imports no torch."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from diffalign.config.build import build as build_dataclass
from diffalign.config.schema import RolloutConfig
from diffalign.errors import UserError, unknown

if TYPE_CHECKING:
    from diffalign.types import Method


class DataKind(StrEnum):
    """Kind of the training data of a method. Values are the text of listings; code compares members."""

    PAIRS = "pairs"
    WINNERS = "pairs (winners only)"
    REWARDED_PAIRS = "pairs with a reward"
    SCORED_PAIRS = "pairs, with a reward model's scores"
    PATCHED_PAIRS = "pairs with patch maps"
    DENSE_PAIRS = "videos in pairs, labelled segment by segment"
    LISTS = "lists"
    LIKES = "likes"
    CAPTIONS = "captions"
    DEMONSTRATIONS = "demonstrations"
    ROLLOUTS = "rollouts"
    DIFFERENTIABLE = "prompts and a differentiable reward"
    TEACHER = "prompts and a teacher"
    TEACHER_AND_REWARD = "prompts, a teacher and a reward"


OFFLINE_ONLY = frozenset({DataKind.CAPTIONS, DataKind.PATCHED_PAIRS, DataKind.DEMONSTRATIONS})
"""Kinds of data that rollouts cannot supply."""


@dataclass(frozen=True)
class MethodCard:
    """Metadata of a method, for ``diffalign methods``, the README and the assembly of a run.

    Attributes:
        name: module name and value of ``method.type``.
        title: name of the method in the literature.
        paper: authors and title.
        year: year of publication.
        arxiv: arXiv id, or "openreview:" and the forum's id for a paper that is not on arXiv.
        data: kind of its training data.
        cost: network samples per group and step, in words.
        method: dataclass that implements it.
        rollout: online training data: finished "samples", the steps of "trajectories", a "tree" of rival
            steps, the "gradients" of a reward through the method's own sampling, or a "distillation" through
            the method's own sampling. The last four have no offline form.
        advantages: whether it uses advantages (rollout.advantage) instead of comparisons.
        whole: whether a batch must hold all samples of a prompt; it always does for methods that compare.
        soft: whether votes of the data are used as soft labels (``methods._common.pair_losses``); other
            methods use the majority.
        means: whether its rollouts record the mean of each step when drawn (``extra["drawn_mean"]``).
        beside: whether it uses real samples (``data.path``) beside its rollouts.
        by_reference: whether the last sample of each prompt is drawn by the reference;
            ``extra["of_reference"]``, (B,), is 1 for those and 0 for others.
        taught: whether it uses a teacher's steps (``extra["reference_mean"]``) and no score: rewards are
            logged only, and deterministic steps are trained on too.
        assistants: names of trained networks that are fitted to the policy's samples
            (``methods._distillation``).
        trailing: moving averages of the policy: "none"; one that the method compares the policy with
            ("beside"); one that also samples the rounds ("sampler"); or two, the second of which samples
            ("both"). The method is then a ``methods._trailing.Trailing``, or a ``TrailingSampler``.
    """

    name: str
    title: str
    paper: str
    year: int
    arxiv: str
    data: DataKind
    cost: str
    method: type
    rollout: Literal["samples", "trajectories", "tree", "gradients", "distillation"] = "samples"
    advantages: bool = False
    whole: bool = False
    soft: bool = False
    means: bool = False
    beside: bool = False
    by_reference: bool = False
    taught: bool = False
    assistants: tuple[str, ...] = ()
    trailing: Literal["none", "beside", "sampler", "both"] = "none"

    @property
    def dense(self) -> bool:
        """Whether the method compares videos segment by segment and needs a label for each segment."""
        return self.data is DataKind.DENSE_PAIRS

    @property
    def source(self) -> str:
        """The arXiv or OpenReview id of the paper, in words."""
        forum = self.arxiv.removeprefix("openreview:")
        return f"arXiv {self.arxiv}" if forum == self.arxiv else f"OpenReview {forum}"

    @property
    def url(self) -> str:
        """The address of the paper."""
        forum = self.arxiv.removeprefix("openreview:")
        if forum == self.arxiv:
            return f"https://arxiv.org/abs/{self.arxiv}"
        return f"https://openreview.net/forum?id={forum}"


class _Registry(Mapping[str, MethodCard]):
    """Mapping of names (modules of the package) to cards (imported on access)."""

    def __iter__(self) -> Iterator[str]:
        package = importlib.import_module("diffalign.methods")
        return (
            m.name
            for m in pkgutil.iter_modules(package.__path__)
            if m.name[0] != "_" and m.name != "registry"
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> MethodCard:
        if name not in set(self):
            raise KeyError(name)
        card: MethodCard = importlib.import_module(f"diffalign.methods.{name}").CARD
        return card


REGISTRY: Mapping[str, MethodCard] = _Registry()


def check_name(name: object) -> None:
    """Check the name of a method.

    Raises:
        UserError: it is unknown; a loss of DPO is named as such, since some papers call it a method.
    """
    if name in set(REGISTRY):
        return
    from diffalign.losses.pairwise import LOSSES  # imports torch, which only this error needs

    if name in LOSSES:
        raise UserError(
            f"unknown method (method.type) {name!r}: it is a loss of dpo; allowed: --method dpo "
            f"--method.loss {name}"
        )
    raise unknown("method (method.type)", name, REGISTRY)


def build(values: Mapping[str, Any]) -> "Method[Any]":
    """Return the method of a ``method`` section, such as ``{"type": "dpo", "beta": 5000, "loss": "ipo"}``.

    Raises:
        UserError: no ``type``, an unknown method, or keys and values that the method does not accept.
    """
    if "type" not in values:
        raise UserError(f"method={dict(values)!r} has no `type`; allowed: {', '.join(REGISTRY)}")
    check_name(values["type"])
    fields = {k: v for k, v in values.items() if k != "type"}
    built: Method[Any] = build_dataclass(REGISTRY[values["type"]].method, fields, "method")
    return built


def shape_of(method: str, rollout: RolloutConfig) -> str:
    """Return the shape of a round: ``rollout.shape``, or with "auto" that of the method's card.

    Raises:
        UserError: ``rollout.shape`` is one that the method cannot be trained on.
    """
    needed, named = REGISTRY[method].rollout, rollout.shape
    if named == "auto":
        return needed
    if needed in ("gradients", "distillation"):
        raise UserError(f"rollout.shape={named!r} with method {method}, which samples itself; allowed: auto")
    if (needed == "samples") != (named == "samples"):
        raise UserError(
            f"rollout.shape={named!r} with method {method}, which is trained on {needed}; allowed: "
            + ("samples" if needed == "samples" else "trajectories, tree")
        )
    return named
