"""What a run says of the labels of its set, and whether its method can read them."""

from collections.abc import Callable
from itertools import islice
from typing import Any

from diffalign.config.schema import Run
from diffalign.data import EncodedSet, Preferences
from diffalign.data.reading.examples import Counts, Example
from diffalign.diffusion.likelihood import PerSample
from diffalign.errors import UserError
from diffalign.methods import REGISTRY
from diffalign.methods.registry import DataKind
from diffalign.types import Method


def tell_unliked(method: str, counts: Counts, tell: Callable[[str], None]) -> None:
    """Print how many single images a method of winners cannot use, since they are not liked."""
    if REGISTRY[method].data is DataKind.WINNERS and counts.disliked:
        tell(f"data: {method} learns from liked images: {counts.disliked:,} disliked ones have no gradient")


def tell_of_votes(run: Run, encoded: EncodedSet, tell: Callable[[str], None]) -> None:
    """Warn of votes that the method ignores."""
    if "votes" in encoded.extras and not REGISTRY[run.method["type"]].soft:
        tell(
            f"warning: the set has votes, and {run.method['type']} learns from the majority; methods with "
            f"soft labels: {', '.join(name for name, card in REGISTRY.items() if card.soft)}"
        )


def tell_of_maps(run: Run, encoded: EncodedSet, tell: Callable[[str], None]) -> None:
    """Warn of weight maps that nobody reads."""
    patched = REGISTRY[run.method["type"]].data is DataKind.PATCHED_PAIRS
    masked = any(entry.get("type") == "masked" for entry in run.strategies)
    if "patches" in encoded.extras and not (patched or masked):
        tell(
            f"warning: the set has maps (columns mask or patches), and {run.method['type']} does not read "
            "them; the strategy masked does"
        )


def tell_of_time_labels(run: Run, encoded: EncodedSet, tell: Callable[[str], None]) -> None:
    """Warn of labels in intervals of time that the method ignores."""
    there = "time_labels" in encoded.extras or run.data.time_labels is not None
    if there and run.method["type"] != "semi_dpo":
        tell(f"warning: the set has time_labels, and {run.method['type']} does not read them; semi_dpo does")


def look_at_labels(run: Run, inner: Method[Any], preferences: Preferences) -> None:
    """Check the kind of labels of the first row; where the method needs dense ones, of the rows up to the
    first dense one (a set may have both kinds, and a global label then counts for all frames).
    """
    if run.data.frames is None or run.data.view not in ("auto", "pairs") or run.data.rewards_as != "extra":
        return  # images, or labels that are recomputed
    rows = (row for row in preferences.unfinished() if isinstance(row, Example))
    if REGISTRY[run.method["type"]].dense:
        check_labels(run, inner, any(row.segments for row in rows))
    else:
        check_labels(run, inner, any(row.segments for row in islice(rows, 1)))


def check_labels(run: Run, inner: Method[Any], dense: bool) -> None:
    """Raise a UserError where labels are dense and the method compares whole videos, or the reverse."""
    name = run.method["type"]
    if dense and isinstance(inner.reduce, PerSample):
        raise UserError(
            f"method.type={name!r} compares whole videos, but labels are dense; allowed: densedpo, or "
            "data.view majority, which makes one label of a video's"
        )
    if REGISTRY[name].dense and not dense:
        raise UserError(
            f"method.type={name!r} compares videos segment by segment, but no label is dense; allowed: rows "
            "with `segments` (`diffalign label-segments` makes them), or dpo"
        )
