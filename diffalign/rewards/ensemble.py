"""Ensemble reward: a weighted sum of rewards listed in a YAML file, named by the spec ``ensemble:FILE.yaml``.

    members:
      - {reward: pickscore, weight: 0.5, mean: 21.2, std: 1.3}
      - {reward: "aesthetic_v2:/models/head.pth", weight: 0.3, divide: 10}
      - {reward: jpeg, weight: -0.001}

Each member is a reward spec and contributes weight x (score - mean) / std. ``divide`` sets the std alone; the
defaults are mean 0 and std 1. The sum uses one image at a time; ``rewards.combine`` has the rules that
compare an image with its rivals. An ensemble is named after its file. The score cache stores the members'
scores, not the sum, so changing a weight needs no new scoring.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.config.files import read_yaml
from diffalign.errors import UserError, unknown
from diffalign.rewards.prompt_checks import check_prompts
from diffalign.rewards.registry import Place, load, parse
from diffalign.rewards.videos import VideoReward, takes_videos
from diffalign.rewards.zoo.step_aware import TimedReward
from diffalign.types import Reward

_FIELDS = ("reward", "weight", "mean", "std", "divide")


@dataclass(frozen=True)
class Member:
    """One member of an ensemble: a reward spec and the constants of weight x (score - mean) / std."""

    spec: str
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0


def read_members(source: str | None) -> tuple[Member, ...]:
    """Return the members that the file ``source`` lists.

    Raises:
        UserError: no such file, or a malformed one; it names the member and what is allowed.
    """
    if source is None:
        raise UserError("reward 'ensemble' needs a file of its members; write ensemble:FILE.yaml")
    file = Path(source).expanduser()
    if not re.fullmatch(r"[\w.-]+", file.stem):
        raise UserError(
            f"ensemble {source!r} is named after its file; allowed in the name: letters, digits, _, - and ."
        )
    if not file.is_file():
        raise UserError(f"ensemble {source!r}: no such file")
    data = read_yaml(file)
    for name in data:
        if name != "members":
            raise unknown(f"field of {file}", name, ["members"])
    rows = data.get("members")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: members is {rows!r}; allowed: a list such as [{{reward: pickscore}}]")
    members = tuple(_member(row, f"{file} member {number}") for number, row in enumerate(rows, 1))
    specs = [member.spec for member in members]
    for spec in specs:
        if specs.count(spec) > 1:
            raise UserError(f"{file} has {spec!r} twice; allowed: each reward once")
    return members


def judges_edits(spec: str) -> bool:
    """Return whether a reward, or a member of an ensemble, judges edits of a source image.

    Raises:
        UserError: as ``parse``, or an ensemble's file that cannot be read.
    """
    card, source = parse(spec)
    if not card.of_others:
        return card.edits
    return any(judges_edits(member.spec) for member in read_members(source))


def _member(row: Any, where: str) -> Member:
    if not isinstance(row, Mapping) or not isinstance(row.get("reward"), str):
        raise UserError(f"{where} is {str(row)[:60]!r}; needed: a mapping with the name of a reward")
    for name in row:
        if name not in _FIELDS:
            raise unknown(f"field of {where}", name, _FIELDS)
    try:
        card, _ = parse(row["reward"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if card.of_others:
        raise UserError(f"{where}: {row['reward']!r} is an ensemble itself; allowed: its members")
    numbers = {name: _number(row[name], name, where) for name in _FIELDS[1:] if name in row}
    if "divide" in numbers and ("std" in numbers or "mean" in numbers):
        raise UserError(f"{where} has divide beside mean or std; allowed: divide alone, or mean and std")
    std = numbers.get("divide", numbers.get("std", 1.0))
    if std <= 0:
        raise UserError(f"{where}: {'divide' if 'divide' in numbers else 'std'} is {std}; allowed: above 0")
    if numbers.get("weight") == 0:
        raise UserError(f"{where}: weight is 0; allowed: another number, or leave the member out")
    return Member(row["reward"], numbers.get("weight", 1.0), numbers.get("mean", 0.0), std)


def _number(value: Any, name: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{where}: {name} is {value!r}; allowed: a finite number")
    return float(value)


def total(members: Sequence[Member], columns: Sequence[Float[Tensor, " B"]]) -> Float[Tensor, " B"]:
    """Return the weighted sum of the members' scores, (B,) float32 on the CPU.

    The sum is computed in float64, on the CPU because members may run on different devices.
    """
    parts = [
        member.weight * (column.cpu().double() - member.mean) / member.std
        for member, column in zip(members, columns, strict=True)
    ]
    return torch.stack(parts).sum(0).float()


@dataclass(frozen=True)
class Ensemble:
    """A weighted sum of rewards.

    Attributes:
        members: weights and normalisation, one entry a reward.
        rewards: the loaded rewards, in the order of ``members``.
    """

    members: tuple[Member, ...]
    rewards: tuple[Reward, ...]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for prompts that a member cannot score."""
        for reward in self.rewards:
            check_prompts(reward, prompts)

    def __call__(self, images: Any, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,), float32."""
        return total(self.members, [reward(images, prompts) for reward in self.rewards])


@dataclass(frozen=True)
class TimedEnsemble:
    """An ensemble with at least one ``TimedReward``; the other members ignore the time."""

    ensemble: Ensemble

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for prompts that a member cannot score."""
        self.ensemble.check_prompts(prompts)

    def __call__(self, images: Any, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,) of finished images, float32."""
        return self.ensemble(images, prompts)

    def at(self, images: Any, prompts: Sequence[str], t: Tensor) -> Float[Tensor, " B"]:
        """Return scores (B,), float32, of clean estimates made at times ``t`` (B,) in [0, 1]."""
        columns = [
            reward.at(images, prompts, t) if isinstance(reward, TimedReward) else reward(images, prompts)
            for reward in self.ensemble.rewards
        ]
        return total(self.ensemble.members, columns)


def ensemble_of(name: str, members: Sequence[Member], rewards: Sequence[Reward]) -> Reward:
    """Return the members as one reward.

    It is a ``VideoReward`` if a member is, a ``TimedEnsemble`` if a member is a ``TimedReward``, else an
    ``Ensemble``.

    Raises:
        UserError: the members include both kinds.
    """
    videos = any(isinstance(reward, VideoReward) for reward in rewards)
    timed = any(isinstance(reward, TimedReward) for reward in rewards)
    if videos and timed:
        raise UserError(
            f"ensemble {name!r} has a reward of videos beside one of noisy times; allowed: either"
        )
    if videos:
        return VideoReward(name, Ensemble(tuple(members), tuple(map(takes_videos, rewards))))
    ensemble = Ensemble(tuple(members), tuple(rewards))
    return TimedEnsemble(ensemble) if timed else ensemble


def make(source: str | None, place: Place) -> Reward:
    """Return the ensemble of a file; raises as ``read_members`` and ``rewards.load`` do."""
    members = read_members(source)
    rewards = [load(member.spec, place.device, place.dtype, place.batch_size) for member in members]
    return ensemble_of(Path(str(source)).stem, members, rewards)
