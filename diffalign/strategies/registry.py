"""Finds the strategies: every module of the package that has a ``CARD``. Listing names imports no torch."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from diffalign.config.build import build as build_dataclass
from diffalign.errors import UserError, unknown

if TYPE_CHECKING:
    from diffalign.strategies._common import Strategy
    from diffalign.types import Method


@dataclass(frozen=True)
class StrategyCard:
    """What a strategy is, for ``diffalign methods`` and the README.

    Attributes:
        name: module and configuration name.
        title: the name that the field uses.
        paper: authors, title.
        year: of the paper.
        arxiv: arXiv id; "" where there is none.
        composes: with which methods.
        cost: network samples per group and step on top of the method's, in words.
        strategy: the dataclass.
        outermost: whether it must reach two policies, and so stands last in a list.
    """

    name: str
    title: str
    paper: str
    year: int
    arxiv: str
    composes: str
    cost: str
    strategy: type
    outermost: bool = False

    @property
    def source(self) -> str:
        """Where to read on, in words."""
        return f"arXiv {self.arxiv}" if self.arxiv else "no paper of its own"


class _Registry(Mapping[str, StrategyCard]):
    """Names by listing the package; a card by importing its module."""

    def __iter__(self) -> Iterator[str]:
        package = importlib.import_module("diffalign.strategies")
        names = (module.name for module in pkgutil.iter_modules(package.__path__))
        return (name for name in names if name != "registry" and not name.startswith("_"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> StrategyCard:
        if name not in set(self):
            raise KeyError(name)
        card: StrategyCard = importlib.import_module(f"diffalign.strategies.{name}").CARD
        return card


STRATEGIES: Mapping[str, StrategyCard] = _Registry()


def check(values: Sequence[Mapping[str, Any]]) -> None:
    """Names only, without torch: each entry has a ``type`` that exists, and none stands twice.

    Raises:
        UserError: otherwise.
    """
    seen = set()
    for i, entry in enumerate(values):
        if not isinstance(entry.get("type"), str):
            raise UserError(
                f"strategies[{i}]={dict(entry)!r} has no `type`; allowed: {', '.join(sorted(STRATEGIES))}"
            )
        name = entry["type"]
        if name not in set(STRATEGIES):
            raise unknown(f"strategy (strategies[{i}].type)", name, STRATEGIES)
        if name in seen:
            raise UserError(f"strategies[{i}].type={name!r} stands twice; allowed: each strategy once")
        seen.add(name)


def build(values: Sequence[Mapping[str, Any]]) -> "list[Strategy]":
    """Return the strategies that a ``strategies`` section describes: ``[{"type": "sdpo", "mu": 0.9}]``.

    Raises:
        UserError: an entry without ``type``, an unknown or repeated strategy, one that must stand last and
            does not, or keys and values that do not fit.
    """
    check(values)
    built: list[Strategy] = []
    for i, entry in enumerate(values):
        card, fields = STRATEGIES[entry["type"]], {k: v for k, v in entry.items() if k != "type"}
        if card.outermost and i + 1 < len(values):
            raise UserError(
                f"strategies[{i}].type={card.name!r} wraps two policies; allowed: as the last one"
            )
        built.append(build_dataclass(card.strategy, fields, f"strategies[{i}]"))
    return built


def wrap(method: "Method[Any]", values: Sequence[Mapping[str, Any]]) -> "Method[Any]":
    """Return ``method`` inside the strategies of a section, the first of them innermost.

    Raises:
        UserError: as ``build``, or a strategy that this method cannot be put into.
    """
    wrapped: Method[Any] = reduce(lambda inner, strategy: strategy.wrap(inner), build(values), method)
    return wrapped
