"""Choose comparisons from scores: which rivals of a prompt are compared, and which comparisons are ties."""

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
    """Rules for the choice of comparisons.

    Attributes:
        choose: "best-worst": the best against the worst; "top-bottom": each of the ``top`` best against each
            of the ``top`` worst; "all": every two rivals; "list": all rivals as one ranked list.
        top: number of best and of worst rivals, at most half of the rivals.
        margin: smallest difference of the scores of a pair, or of the best and the worst of a list.
        tie: largest difference of scores that is a tie; it takes precedence over the margin.
        keep_ties: whether ties are written, labelled as ties, or dropped.
        most: largest number of pairs of a prompt, those with the largest differences; None: all.
    """

    choose: Choice = "best-worst"
    top: int = 1
    margin: float = 0.0
    tie: float = 0.0
    keep_ties: bool = False
    most: int | None = None


@dataclass(frozen=True)
class Comparison:
    """A comparison of rivals.

    Attributes:
        places: indices of the rivals in their group, ascending.
        labels: one label a rival. Pair: 1 and 0, or 0.5 twice for a tie. List: the scores, or 0.5 each for a
            tie.
    """

    places: tuple[int, ...]
    labels: tuple[float, ...]

    @property
    def is_tie(self) -> bool:
        """Whether the comparison is a tie."""
        return min(self.labels) == max(self.labels)


def choose(scores: Sequence[float], rules: Rules) -> tuple[list[Comparison], Counter[Why]]:
    """Return the comparisons among one prompt's rivals, by their places, and the counts of dropped ones.

    The reasons are "ties", "close" (difference below the margin) and "beyond" (more pairs than ``most``). Of
    equal scores the earlier one counts as better. Fewer than two rivals give no comparison.

    Args:
        scores: one score a rival.
        rules: the rules.
    """
    dropped: Counter[Why] = Counter()
    if len(scores) < 2:
        return [], dropped
    if rules.choose == "list":
        return list(_accepted([tuple(range(len(scores)))], scores, rules, dropped)), dropped
    accepted = _accepted(_pairs(scores, rules), scores, rules, dropped)
    if rules.most is None:
        return sorted(accepted, key=lambda pair: pair.places), dropped
    total: Counter[str] = Counter()
    largest = heapq.nsmallest(
        rules.most, _counted(accepted, total), key=lambda pair: (-_spread(pair.places, scores), pair.places)
    )
    dropped["beyond"] = total["pairs"] - len(largest)
    return sorted(largest, key=lambda pair: pair.places), dropped


def _pairs(scores: Sequence[float], rules: Rules) -> Iterable[tuple[int, ...]]:
    """Return the pairs of places, each ascending, that ``rules.choose`` considers."""
    if rules.choose == "all":
        return combinations(range(len(scores)), 2)
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    top = min(1 if rules.choose == "best-worst" else rules.top, len(order) // 2)
    return (tuple(sorted(pair)) for pair in product(order[:top], order[-top:]))


def _accepted(
    groups: Iterable[tuple[int, ...]], scores: Sequence[float], rules: Rules, dropped: Counter[Why]
) -> Iterator[Comparison]:
    """Yield the comparisons that pass the rules on ties and margin; count the others in ``dropped``."""
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
    rivals = tuple(scores[place] for place in places)
    return rivals if rules.choose == "list" else tuple(float(score == max(rivals)) for score in rivals)


def _spread(places: tuple[int, ...], scores: Sequence[float]) -> float:
    rivals = [scores[place] for place in places]
    return max(rivals) - min(rivals)


def _counted(pairs: Iterator[Comparison], total: Counter[str]) -> Iterator[Comparison]:
    for pair in pairs:
        total["pairs"] += 1
        yield pair
