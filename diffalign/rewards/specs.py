"""Weighted reward specs of a rollout: a spec (see ``rewards.registry``) with an optional weight before it.

Examples: ``pickscore``, ``0.5*pickscore``, ``-1*jpeg``, ``pickscore:/models/PickScore_v1``,
``http://host:8765/judge``. Importing this module does not import torch, since configurations are checked with
it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffalign.errors import UserError
from diffalign.rewards.registry import parse


@dataclass(frozen=True)
class Weighted:
    """A reward with a weight.

    Attributes:
        name: the reward's name in logs and tables.
        spec: what ``rewards.load`` takes.
        weight: factor of its score; finite and not 0.
    """

    name: str
    spec: str
    weight: float = 1.0


def weighted(text: str) -> Weighted:
    """Parse ``WEIGHT*SPEC``, such as ``0.5*pickscore``; without a star the weight is 1.

    Raises:
        UserError: no such reward, or a weight that is 0 or no finite number.
    """
    factor, star, spec = text.partition("*")
    if not star or ":" in factor:  # a star behind a colon belongs to the source
        return Weighted(parse(text.strip())[0].name, text.strip())
    try:
        weight = float(factor)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise UserError(f"reward {text!r}: the weight {factor!r}; allowed: a finite number other than 0")
    return Weighted(parse(spec.strip())[0].name, spec.strip(), weight)


def all_weighted(texts: Sequence[str]) -> tuple[Weighted, ...]:
    """Parse every entry of ``rollout.rewards`` with ``weighted``.

    Raises:
        UserError: the list is empty, or two entries have one name.
    """
    rewards = tuple(map(weighted, texts))
    if not rewards:
        raise UserError("rollout.rewards is empty; give at least one of `diffalign rewards`")
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"rollout.rewards={list(texts)!r} has {name!r} twice; allowed: each name once")
    return rewards
