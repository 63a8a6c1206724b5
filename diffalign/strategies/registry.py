"""Registry of the strategies: the modules of the package with a ``CARD``; listing them imports no torch."""

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
    """Metadata of a strategy, for ``diffalign methods`` and the README.

    Attributes:
        name: module name and value of ``type`` in a configuration.
        title: name of the strategy in the literature.
        paper: authors and title.
        year: year of publication.
        arxiv: arXiv id; "" if there is none.
        composes: methods that it can be combined with, in words.
        cost: additional network samples per group and step, in words.
        strategy: dataclass that implements it.
        outermost: whether it must be the last of a list, because it trains two policies.
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
        """The arXiv id, in words."""
        return f"arXiv {self.arxiv}" if self.arxiv else "no paper of its own"


class _Registry(Mapping[str, StrategyCard]):
    """Mapping of names (modules of the package) to cards (imported on access)."""

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
    """Check, without torch, that each entry has a known ``type`` and that none is repeated.

    Raises:
        UserError: an entry has no ``type``, an unknown one, or one that an earlier entry has.
    """
    names = set()
    for i, entry in enumerate(values):
        if not isinstance(entry.get("type"), str):
            raise UserError(
                f"strategies[{i}]={dict(entry)!r} has no `type`; allowed: {', '.join(sorted(STRATEGIES))}"
            )
        name = entry["type"]
        if name not in set(STRATEGIES):
            raise unknown(f"strategy (strategies[{i}].type)", name, STRATEGIES)
        if name in names:
            raise UserError(f"strategies[{i}].type={name!r} appears twice; allowed: each strategy once")
        names.add(name)


def build(values: Sequence[Mapping[str, Any]]) -> "list[Strategy]":
    """Return the strategies that a ``strategies`` section describes: ``[{"type": "sdpo", "mu": 0.9}]``.

    Raises:
        UserError: an entry without ``type``, an unknown or repeated strategy, one that must be last and is
            not, or keys and values that the strategy does not accept.
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
    """Return ``method`` wrapped by the strategies of a section, the first of them innermost.

    Raises:
        UserError: as ``build``, or a strategy that cannot be combined with this method.
    """
    wrapped: Method[Any] = reduce(lambda inner, strategy: strategy.wrap(inner), build(values), method)
    return wrapped
