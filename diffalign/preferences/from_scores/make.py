"""Make comparisons of scored candidates: remove duplicates, combine scores, apply the rules."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from diffalign.errors import UserError
from diffalign.preferences.from_scores.candidates import Candidate, Candidates
from diffalign.preferences.from_scores.choose import Comparison, Rules, choose
from diffalign.preferences.from_scores.likeness import dissimilar, distinct
from diffalign.rewards.combine import How, combine, standardised

Dedup = Literal["none", "exact", "near"]


@dataclass(frozen=True)
class Scoring:
    """How R scores of a candidate are combined into one.

    Attributes:
        weights: weights of the rewards; empty: 1 each.
        how: the rule of ``rewards.combine``.
        standardise: whether each reward is first scaled to mean 0 and std 1 over all candidates.
    """

    weights: tuple[float, ...] = ()
    how: How = "sum"
    standardise: bool = False


@dataclass(frozen=True)
class Group:
    """A comparison with its rivals, in the order of its places."""

    rivals: tuple[Candidate, ...]
    comparison: Comparison


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of a source, and counts of what was dropped.

    Attributes:
        groups: the comparisons, with prompts in the order of their first appearance.
        rewards: names of the R rewards.
        lists: whether the comparisons are ranked lists.
        images: number of scored images or videos.
        prompts: number of prompts.
        alone: number of prompts with fewer than two distinct images.
        duplicates: number of images dropped as duplicates of an earlier one of the prompt.
        dropped: number of dropped comparisons by reason, see ``choose``.
        unreadable: location and reason of each unreadable image.
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
        """Counts of comparisons and of what was dropped, in two lines."""
        what = "list" if self.lists else "pair"
        made = f"{_counted(len(self.groups), what)} of {_counted(self.images, 'image')}"
        made += f" of {_counted(self.prompts, 'prompt')}"
        made += f"; {_counted(self.ties, 'tie')} among them" if self.ties else ""
        reasons = (
            (len(self.unreadable), "unreadable image", ""),
            (self.duplicates, "duplicate image", ""),
            (self.alone, "prompt", " with one image"),
            (self.dropped["ties"], "tie", ""),
            (self.dropped["close"], what, " below the margin"),
            (self.dropped["beyond"], what, " beyond the most of a prompt"),
        )
        dropped = [_counted(number, noun) + rest for number, noun, rest in reasons if number]
        return f"{made}\ndropped: {', '.join(dropped) or 'nothing'}"

    @property
    def counts(self) -> dict[str, int]:
        """The counts of ``text``, for JSON."""
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
    source: Candidates,
    rules: Rules,
    scoring: Scoring | None = None,
    dedup: Dedup = "exact",
    levels: int = 8,
) -> Comparisons:
    """Choose comparisons among the candidates of each prompt; the result is deterministic.

    Args:
        source: the candidates.
        rules: which rivals are compared.
        scoring: how several rewards are combined; None: their sum.
        dedup: which images of a prompt are dropped: "none"; "exact": those with the bytes of an earlier one;
            "near": also those that ``likeness.dissimilar`` drops.
        levels: threshold of near duplicates, of 255 levels.

    Raises:
        UserError: "near" with videos, which have no thumbnails.
    """
    scoring = scoring or Scoring()
    weights = scoring.weights or (1.0,) * len(source.rewards)
    scores = torch.tensor([candidate.scores for candidate in source.candidates], dtype=torch.float64)
    scores = standardised(scores) if scoring.standardise else scores
    members: dict[str, list[int]] = {}
    for index, candidate in enumerate(source.candidates):
        members.setdefault(candidate.prompt, []).append(index)
    groups: list[Group] = []
    dropped: Counter[str] = Counter()
    alone = duplicates = 0
    for indices in members.values():
        places = _deduplicated([source.candidates[index] for index in indices], dedup, levels)
        rivals = [indices[place] for place in places]
        duplicates += len(indices) - len(rivals)
        alone += len(rivals) < 2
        combined = combine(scores[rivals], weights, scoring.how).tolist()
        chosen, reasons = choose(combined, rules)
        dropped.update(reasons)
        groups += [
            Group(tuple(source.candidates[rivals[place]] for place in comparison.places), comparison)
            for comparison in chosen
        ]
    return Comparisons(
        tuple(groups),
        source.rewards,
        rules.choose == "list",
        len(source.candidates),
        len(members),
        alone,
        duplicates,
        dropped,
        source.unreadable,
    )


def _deduplicated(rivals: Sequence[Candidate], dedup: Dedup, levels: int) -> list[int]:
    """Return the places of the rivals without duplicates."""
    if dedup == "none":
        return list(range(len(rivals)))
    places = distinct([rival.content for rival in rivals])
    if dedup == "exact":
        return places
    thumbnails = [rivals[place].small for place in places]
    if any(small is None for small in thumbnails):
        raise UserError("near duplicates are looked for among images only; allowed of videos: exact, none")
    return [places[i] for i in dissimilar([small for small in thumbnails if small is not None], levels)]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
