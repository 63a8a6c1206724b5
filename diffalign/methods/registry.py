"""Finds the methods: every module of this package that has a ``CARD``. Listing the names imports no torch."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffalign.config.build import build as build_dataclass
from diffalign.config.schema import Run
from diffalign.errors import UserError, unknown

if TYPE_CHECKING:
    from diffalign.types import Method


@dataclass(frozen=True)
class MethodCard:
    """What a method is, for ``diffalign methods`` and the README.

    Attributes:
        name: module and configuration name.
        title: the name that the field uses.
        paper: authors, title and year.
        arxiv: arXiv id, or "openreview:" and the forum's id for a paper that is not on arXiv.
        data: what it learns from: "pairs", "likes", "lists", ...
        cost: network samples per group and step, in words.
        method: the dataclass.
        rollout: what it learns from when a run is online: finished "samples", the steps of "trajectories", or
            a "tree" of rival steps. The last two have no offline form.
        advantages: whether it learns from advantages (rollout.advantage) in place of comparisons.
        whole: whether it must see all samples of a prompt at once; methods that compare always must.
        dense: whether it compares videos segment by segment, and so wants a label for each.
        trailing: who plays besides policy and base: nobody; a moving average of the policy that the method
            is held against ("beside"); or one that also samples the rounds ("sampler"). The method has a
            field ``trail`` and says by ``trails`` whether it is wanted: see ``methods.trailing``.
    """

    name: str
    title: str
    paper: str
    year: int
    arxiv: str
    data: str
    cost: str
    method: type
    rollout: Literal["samples", "trajectories", "tree"] = "samples"
    advantages: bool = False
    whole: bool = False
    dense: bool = False
    trailing: Literal["none", "beside", "sampler"] = "none"

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
    """The method that a ``method`` section describes: ``{"type": "dpo", "beta": 5000, "loss": "ipo"}``.

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
