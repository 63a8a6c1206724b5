"""Make comparisons of scored candidates: remove duplicates, combine scores, apply the rules."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from diffalign.errors import UserError
from diffalign.preferences.from_scores.candidates import Candidate, Found
from diffalign.preferences.from_scores.choose import Comparison, Rules, choose
from diffalign.preferences.from_scores.likeness import distinct, unlike
from diffalign.rewards.combine import How, combine, standardised

Dedup = Literal["none", "exact", "near"]


@dataclass(frozen=True)
class Scoring:
    """How R scores become one: weights (none: 1 each), ``rewards.combine``'s way, and whether each reward is
    first taken to mean 0 and std 1 over all candidates.
    """

    weights: tuple[float, ...] = ()
    how: How = "sum"
    standardise: bool = False


@dataclass(frozen=True)
class Group:
    """A comparison and its rivals, in the order of its places."""

    rivals: tuple[Candidate, ...]
    comparison: Comparison


@dataclass(frozen=True)
class Made:
    """Comparisons, and counts of what was dropped.

    Attributes:
        groups: the comparisons, prompts in the order in which they first appear.
        rewards: names of the R rewards.
        lists: whether they are ranked lists.
        images: scored images or videos there were.
        prompts: of them.
        alone: prompts without two different images.
        duplicates: images left out because an earlier one of the prompt is the same.
        dropped: comparisons by reason: see ``choose``.
        unreadable: "place: why" of each.
    """

    groups: tuple[Group, ...] = field(repr=False)
    rewards: tuple[str, ...]
    lists: bool
    images: int
    prompts: int
    alone: int
    duplicates: int
    dropped: Counter[str]
    unreadable: tuple[str, ...]

    @property
    def ties(self) -> int:
        """Number of comparisons that are ties."""
        return sum(group.comparison.is_tie for group in self.groups)

    @property
    def text(self) -> str:
        """Two lines: counts of what was made, and of what was dropped."""
        what = "list" if self.lists else "pair"
        made = f"{_some(len(self.groups), what)} of {_some(self.images, 'image')}"
        made += f" of {_some(self.prompts, 'prompt')}"
        made += f"; {_some(self.ties, 'tie')} among them" if self.ties else ""
        reasons = (
            (len(self.unreadable), "unreadable image", ""),
            (self.duplicates, "duplicate image", ""),
            (self.alone, "prompt", " with one image"),
            (self.dropped["ties"], "tie", ""),
            (self.dropped["close"], what, " below the margin"),
            (self.dropped["beyond"], what, " beyond the most of a prompt"),
        )
        gone = [_some(number, one) + rest for number, one, rest in reasons if number]
        return f"{made}\ndropped: {', '.join(gone) or 'nothing'}"

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of ``text``, for JSON."""
        return {
            "made": len(self.groups),
            "ties_kept": self.ties,
            "images": self.images,
            "prompts": self.prompts,
            "unreadable": len(self.unreadable),
            "duplicates": self.duplicates,
            "prompts_with_one_image": self.alone,
            "ties_dropped": self.dropped["ties"],
            "below_margin": self.dropped["close"],
            "beyond_most": self.dropped["beyond"],
        }


def make(
    found: Found,
    rules: Rules,
    scoring: Scoring | None = None,
    dedup: Dedup = "exact",
    levels: int = 8,
) -> Made:
    """Return the comparisons among the candidates of each prompt; the same candidates always give the same.

    Args:
        found: candidates.
        rules: which rivals are compared.
        scoring: of several rewards; None: the sum.
        dedup: images of a prompt that are left out: none, those whose bytes an earlier one has, or also those
            whose thumbnails differ from an earlier one's by at most ``levels`` (``likeness.unlike``).
        levels: of 255.

    Raises:
        UserError: videos, of which there are no thumbnails.
    """
    scoring = scoring or Scoring()
    weights = scoring.weights or (1.0,) * len(found.rewards)
    scores = torch.tensor([one.scores for one in found.candidates], dtype=torch.float64)
    scores = standardised(scores) if scoring.standardise else scores
    members: dict[str, list[int]] = {}
    for index, candidate in enumerate(found.candidates):
        members.setdefault(candidate.prompt, []).append(index)
    groups: list[Group] = []
    dropped: Counter[str] = Counter()
    alone = duplicates = 0
    for indices in members.values():
        places = _deduplicated([found.candidates[index] for index in indices], dedup, levels)
        rivals = [indices[place] for place in places]
        duplicates += len(indices) - len(rivals)
        alone += len(rivals) < 2
        one = combine(scores[rivals], weights, scoring.how).tolist()
        chosen, why = choose(one, rules)
        dropped.update(why)
        groups += [
            Group(tuple(found.candidates[rivals[place]] for place in comparison.places), comparison)
            for comparison in chosen
        ]
    return Made(
        tuple(groups),
        found.rewards,
        rules.choose == "list",
        len(found.candidates),
        len(members),
        alone,
        duplicates,
        dropped,
        found.unreadable,
    )


def _deduplicated(rivals: Sequence[Candidate], dedup: Dedup, levels: int) -> list[int]:
    """Return the places that are left."""
    if dedup == "none":
        return list(range(len(rivals)))
    places = distinct([one.content for one in rivals])
    if dedup == "exact":
        return places
    thumbnails = [rivals[place].small for place in places]
    if any(small is None for small in thumbnails):
        raise UserError("near duplicates are looked for among images only; allowed of videos: exact, none")
    return [places[i] for i in unlike([small for small in thumbnails if small is not None], levels)]


def _some(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
