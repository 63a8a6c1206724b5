"""Finds the methods: every module of this package that has a ``CARD``. Listing the names imports no torch."""

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
    """What a method learns from. The value is the sentence that listings show; code compares members."""

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
"""What no rollout gives."""


@dataclass(frozen=True)
class MethodCard:
    """What a method is, for ``diffalign methods`` and the README.

    Attributes:
        name: module and configuration name.
        title: the name that the field uses.
        paper: authors, title and year.
        arxiv: arXiv id, or "openreview:" and the forum's id for a paper that is not on arXiv.
        data: what it learns from.
        cost: network samples per group and step, in words.
        method: the dataclass.
        rollout: what it learns from when a run is online: finished "samples", the steps of "trajectories", or
            a "tree" of rival steps, the "gradients" of a reward through its own sampling, or its own sampling
            by a "distillation". The last four have no offline form.
        advantages: whether it learns from advantages (rollout.advantage) in place of comparisons.
        whole: whether it must see all samples of a prompt at once; methods that compare always must.
        soft: whether it learns from the votes of a set as soft labels (``methods._common.pair_losses``);
            other methods learn from the majority.
        means: whether its rollouts record the mean of each step as it was drawn (``extra["drawn_mean"]``).
        beside: whether it learns from real samples (``data.path``) beside what it draws.
        by_reference: whether the last sample of each prompt must be the reference's; which are is in
            ``extra["of_reference"]``, (B,) 1 or 0.
        taught: whether it learns from a teacher's steps (``extra["reference_mean"]``) and from no score:
            rewards are watched only, and steps that are no draws teach as well.
        assistants: names of trained networks that follow what the policy samples
            (``methods._distillation``).
        trailing: the role of a moving average of the policy: "none"; a denoiser that the method compares the
            policy with ("beside"); one that samples the rounds as well ("sampler"); or two of them, the
            second of which samples ("both"). The method is then a ``methods._trailing.Trailing``, or a
            ``TrailingSampler``.
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
        """Whether the method compares videos segment by segment, and so needs a label for each."""
        return self.data is DataKind.DENSE_PAIRS

    @property
    def source(self) -> str:
        """Where the paper is, in words."""
        forum = self.arxiv.removeprefix("openreview:")
        return f"arXiv {self.arxiv}" if forum == self.arxiv else f"OpenReview {forum}"

    @property
    def url(self) -> str:
        """Where the paper is."""
        forum = self.arxiv.removeprefix("openreview:")
        if forum == self.arxiv:
            return f"https://arxiv.org/abs/{self.arxiv}"
        return f"https://openreview.net/forum?id={forum}"


class _Registry(Mapping[str, MethodCard]):
    """Names by listing the package; a card by importing its module."""

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


def build(values: Mapping[str, Any]) -> "Method[Any]":
    """Return the method that a ``method`` section describes: ``{"type": "dpo", "beta": 5000, "loss":
    "ipo"}``.

    Raises:
        UserError: no ``type``, an unknown method, or keys and values that do not fit it.
    """
    if "type" not in values:
        raise UserError(f"method={dict(values)!r} has no `type`; allowed: {', '.join(REGISTRY)}")
    if values["type"] not in set(REGISTRY):
        raise unknown("method (method.type)", values["type"], REGISTRY)
    fields = {k: v for k, v in values.items() if k != "type"}
    built: Method[Any] = build_dataclass(REGISTRY[values["type"]].method, fields, "method")
    return built


def shape_of(method: str, rollout: RolloutConfig) -> str:
    """Return what a round is made of: what the method ``method`` learns from, unless the section names it.

    Raises:
        UserError: the section names what the method cannot learn from.
    """
    needed, named = REGISTRY[method].rollout, rollout.shape
    if named == "auto":
        return needed
    if needed in ("gradients", "distillation"):
        raise UserError(f"rollout.shape={named!r} with method {method}, which samples itself; allowed: auto")
    if (needed == "samples") != (named == "samples"):
        raise UserError(
            f"rollout.shape={named!r} with method {method}, which learns from {needed}; allowed: "
            + ("samples" if needed == "samples" else "trajectories, tree")
        )
    return named
