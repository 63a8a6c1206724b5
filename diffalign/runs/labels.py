"""What a run says of the labels of its set, and whether its method can read them."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffalign.config.schema import Run
from diffalign.data import EncodedSet, Preferences
from diffalign.data.prompts.prompt_syntax import empty_note, notes_on, syntax_note
from diffalign.data.reading.examples import Counts, Example
from diffalign.diffusion.likelihood import PerSample
from diffalign.errors import UserError
from diffalign.media.images import note_on_frames
from diffalign.methods import REGISTRY
from diffalign.methods._common import extras_of
from diffalign.methods.registry import DataKind
from diffalign.models.loaded import LoadedModel
from diffalign.strategies.registry import build as build_strategies
from diffalign.types import Method
from diffalign.utils.distributed import gathered


def tell_unliked(method: str, counts: Counts, tell: Callable[[str], None]) -> None:
    """Print how many single images a method of winners cannot use, since they are not liked."""
    if REGISTRY[method].data is DataKind.WINNERS and counts.disliked:
        tell(f"data: {method} learns from liked images: {counts.disliked:,} disliked ones have no gradient")


COMPARING = frozenset(
    {
        DataKind.PAIRS,
        DataKind.REWARDED_PAIRS,
        DataKind.SCORED_PAIRS,
        DataKind.PATCHED_PAIRS,
        DataKind.DENSE_PAIRS,
        DataKind.LISTS,
    }
)
"""What methods learn from that compare the samples of a group: an image alone teaches them nothing."""


def check_rivals(run: Run, encoded: EncodedSet, tell: Callable[[str], None]) -> None:
    """Check that a method that compares has something to compare; ``tell`` gets what it cannot use.

    Raises:
        UserError: no group has what the method compares, and no strategy gives the groups another loss.
    """
    name, kind, sizes = run.method["type"], REGISTRY[run.method["type"]].data, encoded.records.sizes
    if kind is DataKind.CAPTIONS and not run.strategies and "caption" not in encoded.records.kinds:
        raise UserError(
            f"method.type={name!r} compares captions of one image, and no group of the set has several; "
            "allowed: data.view captions, which alters each caption, or a method of pairs"
        )
    given = "reward" in encoded.extras or run.data.rewards_as != "extra"
    if kind is DataKind.REWARDED_PAIRS and not given:
        tell(
            f"warning: the set has no rewards, and {name} weights pairs by their margins: labels of 1 and 0 "
            "weight all alike; data.rewards gives some"
        )
    alone = int((sizes == 1).sum())
    if kind not in COMPARING or not alone:
        return
    if alone == len(sizes) and not run.strategies:
        of_one = [n for n, card in REGISTRY.items() if card.data in (DataKind.LIKES, DataKind.WINNERS)]
        raise UserError(
            f"method.type={name!r} compares images of one prompt, and the set has {alone:,} single images "
            f"and nothing to compare; allowed with them: {', '.join(of_one)}, or a set of pairs"
        )
    tell(f"warning: {alone:,} of {len(sizes):,} groups are single images, from which {name} learns nothing")


def tell_of_empty_prompts(prompts: pa.ChunkedArray, tell: Callable[[str], None]) -> None:
    """Warn of groups without a prompt, (N,) texts, which train the unconditional model."""
    if note := empty_note(prompts.to_pylist()):
        tell(f"warning: {note}")


def tell_of_contents(encoded: EncodedSet, tell: Callable[[str], None]) -> None:
    """Print what is unusual in the prompts and the images of an encoded set."""
    prompts = encoded.records.column("prompt")
    tell_of_empty_prompts(prompts, tell)
    if note := syntax_note(prompt.as_py() for prompt in prompts):
        tell(f"note: {note}")
    if note := note_on_frames(pc.unique(pc.list_flatten(encoded.records.column("animated"))).to_pylist()):
        tell(f"warning: {note}")
    tell_of_cuts(encoded.records.column("images"), tell)


def tell_of_list(prompts: Sequence[str], tell: Callable[[str], None], kind: str = "") -> None:
    """Print what the prompts of a list have that may not be meant as a part; ``kind`` says whose."""
    for note in notes_on(prompts):
        tell(f"note: {kind}{note}")


ENLARGED = 1.25
"""Factor from which on enlarged images are told."""
KEPT = 0.5
"""Share of an image below which a crop is told."""


def tell_of_cuts(images: pa.ChunkedArray, tell: Callable[[str], None]) -> None:
    """Warn of images that are much smaller than the training size, or lose most of their area to the crop.

    ``images`` is the column of a set's records: lists of images with their cuts.
    """
    flat = pc.list_flatten(images).combine_chunks()
    sides = [
        pc.list_flatten(pc.struct_field(flat, name)).to_numpy(zero_copy_only=False).reshape(-1, 2)
        for name in ("original", "resized", "target")
    ]
    original, resized, target = (side.astype(np.float64) for side in sides)
    factors = (resized / original).max(1) if len(flat) else np.zeros(0)
    if small := int((factors >= ENLARGED).sum()):
        height, width = sides[0][int(factors.argmax())]
        tell(
            f"warning: {small:,} of {len(flat):,} images are smaller than the training size and are "
            f"enlarged, the smallest ({width} x {height}) {factors.max():.1f} times; data.filters.min_side "
            "leaves them out"
        )
    if cut := int((target.prod(1) < KEPT * resized.prod(1)).sum()):
        tell(
            f"warning: {cut:,} of {len(flat):,} images lose more than half of their area to the crop; "
            "data.buckets true keeps shapes"
        )


def tell_of_cut_prompts(model: LoadedModel, tell: Callable[[str], None]) -> None:
    """Warn of the number of prompts whose ends were lost when the processes encoded them; a collective."""
    if cut := sum(gathered(model.truncated_prompts)):
        tell(
            "warning: prompts, encoded now, that are longer than the text encoder reads and lose their ends: "
            f"{cut:,}"
        )


LOOKED_AT = 200
"""Rows in which votes are looked for where a setting needs them."""


def tell_of_votes(run: Run, encoded: EncodedSet, tell: Callable[[str], None]) -> None:
    """Warn of votes that the method ignores."""
    if "votes" in encoded.extras and not REGISTRY[run.method["type"]].soft:
        tell(
            f"warning: the set has votes, and {run.method['type']} learns from the majority; methods with "
            f"soft labels: {', '.join(name for name, card in REGISTRY.items() if card.soft)}"
        )


def look_at_votes(run: Run, preferences: Preferences, tell: Callable[[str], None]) -> None:
    """Warn of settings of votes where the first rows have none; nothing is read without such a setting."""
    data = run.data
    named = [f"data.votes={data.votes!r}"] if data.votes != "soft" else []
    named += [f"data.min_agreement={data.min_agreement:g}"] if data.min_agreement else []
    if not named:
        return
    rows = list(islice(preferences.unfinished(), LOOKED_AT))
    if not any(isinstance(row, Example) and row.votes for row in rows):
        tell(
            f"warning: no effect of {' and '.join(named)}: the set has no votes (none of the first "
            f"{len(rows):,} rows has any)"
        )


_READERS = {
    "patches": ("maps (columns mask or patches)", "the strategy masked does"),
    "time_labels": ("time_labels", "semi_dpo does"),
    "weight": ("weights (a column weight, or data.votes weight)", "the strategy weighted does"),
    "reward": ("rewards", "madpo, smpo, the strategy weighted, data.filters and data.curriculum may"),
}
"""What data beside the labels is, and what reads it, by its name in ``Batch.extra``; for votes see
``tell_of_votes``."""


def tell_of_unread(run: Run, inner: Method[Any], encoded: EncodedSet, tell: Callable[[str], None]) -> None:
    """Warn of data beside the labels that neither the method nor a strategy reads."""
    there = set(encoded.extras) | ({"time_labels"} if run.data.time_labels is not None else set())
    if run.data.rewards or run.data.reads_rewards:  # told before anything is scored, or read
        there -= {"reward"}
    unread = there - extras_of(inner, *build_strategies(run.strategies))
    for name, (what, reader) in _READERS.items():
        if name in unread:
            tell(f"warning: the set has {what}, and {run.method['type']} does not read them; {reader}")


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
