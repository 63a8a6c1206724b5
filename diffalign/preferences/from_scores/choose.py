"""Rules on scores: which rivals of a prompt are compared, and which of them are a tie."""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

Choice = Literal["best-worst", "top-bottom", "all", "list"]
Why = Literal["ties", "close", "beyond"]


@dataclass(frozen=True)
class Rules:
    """Rules by which comparisons are chosen.

    Attributes:
        choose: the best against the worst; each of the ``top`` best against each of the ``top`` worst; every
            two; or all as one ranked list.
        top: how many are best, and how many worst; fewer where there are not twice as many.
        margin: scores of a pair (best and worst of a list) must differ by this or more.
        tie: those that differ by at most this are a tie, whatever the margin.
        keep_ties: whether ties are kept, and labelled so, or dropped.
        most: pairs of a prompt, those with the largest differences.
    """

    choose: Choice = "best-worst"
    top: int = 1
    margin: float = 0.0
    tie: float = 0.0
    keep_ties: bool = False
    most: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Rivals by their places, ascending, and their labels: 1 and 0, or 0.5 twice, for a pair; for a list the
    scores, or 0.5 each for a tie.
    """

    places: tuple[int, ...]
    labels: tuple[float, ...]

    @property
    def is_tie(self) -> bool:
        """Whether the comparison is a tie."""
        return min(self.labels) == max(self.labels)


def choose(scores: Sequence[float], rules: Rules) -> tuple[list[Comparison], Counter[Why]]:
    """Return the comparisons of one prompt's rivals in the order of their places, and how many were dropped
    and why.

    "ties" for ties, "close" for differences below the margin, "beyond" for pairs beyond the most. Of equal
    scores the earlier is the better one. Fewer than two rivals give nothing.
    """
    dropped: Counter[Why] = Counter()
    if len(scores) < 2:
        return [], dropped
    if rules.choose == "list":
        return list(_kept([tuple(range(len(scores)))], scores, rules, dropped)), dropped
    kept = _kept(_pairs(scores, rules), scores, rules, dropped)
    if rules.most is None:
        return sorted(kept, key=lambda pair: pair.places), dropped
    seen: Counter[str] = Counter()
    largest = heapq.nsmallest(
        rules.most, _counted(kept, seen), key=lambda pair: (-_spread(pair.places, scores), pair.places)
    )
    dropped["beyond"] = seen["pairs"] - len(largest)
    return sorted(largest, key=lambda pair: pair.places), dropped


def _pairs(scores: Sequence[float], rules: Rules) -> Iterable[tuple[int, ...]]:
    """Return the pairs of places, ascending, that are looked at."""
    if rules.choose == "all":
        return combinations(range(len(scores)), 2)
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    top = min(1 if rules.choose == "best-worst" else rules.top, len(order) // 2)
    return (tuple(sorted(pair)) for pair in product(order[:top], order[-top:]))


def _kept(
    groups: Iterable[tuple[int, ...]], scores: Sequence[float], rules: Rules, dropped: Counter[Why]
) -> Iterator[Comparison]:
    for places in groups:
        spread = _spread(places, scores)
        if spread <= rules.tie:
            if rules.keep_ties:
                yield Comparison(places, (0.5,) * len(places))
            else:
                dropped["ties"] += 1
        elif spread < rules.margin:
            dropped["close"] += 1
        else:
            yield Comparison(places, _labels(places, scores, rules))


def _labels(places: tuple[int, ...], scores: Sequence[float], rules: Rules) -> tuple[float, ...]:
    own = tuple(scores[place] for place in places)
    return own if rules.choose == "list" else tuple(float(score == max(own)) for score in own)


def _spread(places: tuple[int, ...], scores: Sequence[float]) -> float:
    own = [scores[place] for place in places]
    return max(own) - min(own)


def _counted(pairs: Iterator[Comparison], seen: Counter[str]) -> Iterator[Comparison]:
    for pair in pairs:
        seen["pairs"] += 1
        yield pair
