"""Filters of an encoded set: each leaves groups out and counts them (``Counts.filtered``).

A group is left out by the first filter that it does not pass, in the order of ``FilterConfig``. Rewards are
those that a set has or that ``data.rewards`` adds. Filters compute on columns, not on records.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffalign.config.schema import FilterConfig
from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.encoded import EncodedSet
from diffalign.data.encoding.hashing import distances
from diffalign.data.encoding.shards import halves
from diffalign.errors import UserError

ROUNDS = 32
"""Groups of one prompt up to which near duplicates are sought in all prompts at once."""


def filtered(encoded: EncodedSet, config: FilterConfig) -> EncodedSet:
    """Return the groups that pass every filter.

    Raises UserError if a filter needs rewards or rivals that a group does not have.
    """
    if config.agree_keep == "others" and not config.agree:
        raise UserError(
            "data.filters.agree_keep is 'others', but data.filters.agree is 0, which all groups pass; "
            "allowed: data.filters.agree of at least 1, or agree_keep agreeing"
        )
    left, removed = encoded.records, []
    for name, passes in _filters(config):
        passing = left.take(np.flatnonzero(passes(left)))
        removed.append((name, len(left) - len(passing)))
        left = passing
    if not removed:
        return encoded
    if config.nsfw is not None:
        left = _without(left, config.nsfw)
    found = encoded.holding(left, encoded.dense)
    return found.counted(replace(found.counts, filtered=tuple(removed)))


def agreement_split(encoded: EncodedSet, rewards: int) -> tuple[EncodedSet, EncodedSet]:
    """Return (clean, others): groups whose label at least ``rewards`` rewards agree with, and the rest.

    Semi-DPO (ICLR 2026) learns first from the clean ones, which all of its five rewards confirm, and then
    labels the others with the model itself. Ties have no label to confirm: they count as clean and have
    weight 0.

    Raises UserError if a group has no rewards or no rivals.
    """
    clean = _agrees(encoded.records, rewards)
    return encoded.subset(np.flatnonzero(clean)), encoded.subset(np.flatnonzero(~clean))


def _filters(config: FilterConfig) -> Iterator[tuple[str, Callable[[Columns], np.ndarray]]]:
    """Yield the active filters: a name, and a function that returns which groups pass."""
    if config.words:
        words = [word.casefold() for word in config.words]
        yield "words", lambda c: _of_prompts(c, lambda p: not any(word in p.casefold() for word in words))
    if config.min_prompt or config.max_prompt is not None:
        low, high = config.min_prompt, config.max_prompt
        fits = lambda prompt: low <= len(prompt) and (high is None or len(prompt) <= high)  # noqa: E731
        yield "prompt length", lambda c: _of_prompts(c, fits)
    if config.min_side:
        yield "size", lambda c: _smallest_sides(c) >= config.min_side
    if config.repeats:
        yield "repeats", _first_of_their_kind
    if config.near is not None:
        near = config.near
        yield "near duplicates", lambda c: _no_near_duplicate(c, near)
    if config.nsfw is not None:
        number = config.nsfw
        yield "nsfw", lambda c: _nsfw(c, number) <= config.max_nsfw
    if config.agree:
        others = config.agree_keep == "others"
        name = "agreement: the others are kept" if others else "agreement"
        yield name, lambda c: _agrees(c, config.agree) != others
    if config.min_margin:
        yield "margin", lambda c: (c.kinds == "tie") | (margin(c) >= config.min_margin)


def _of_prompts(columns: Columns, passes: Callable[[str], bool]) -> np.ndarray:
    prompts, codes = columns.prompts
    passed: np.ndarray = np.array([passes(prompt) for prompt in prompts], bool)[codes]
    return passed


def _smallest_sides(columns: Columns) -> np.ndarray:
    """Return (n,) the shortest side of each group's original images, in pixels."""
    if not len(columns):
        return np.zeros(0, np.int64)
    original = pc.struct_field(pc.list_flatten(columns.column("images")), "original")
    sides = pc.list_flatten(original).to_numpy().reshape(-1, 2).min(1)
    return np.minimum.reduceat(sides, columns.starts)


def _first_of_their_kind(columns: Columns) -> np.ndarray:
    """Return which groups have another prompt, source or other image files than every earlier group."""
    passes = np.zeros(len(columns), bool)
    contents = _keys(pc.struct_field(pc.list_flatten(columns.column("images")), "content"))
    sources = np.full(len(columns), bytes(16), "S16")
    given = pc.struct_field(columns.column("source").drop_null(), "content")
    sources[columns.has_source] = _keys(given)
    text, texts = _keys(columns.column("text")), _keys(pc.list_flatten(columns.column("texts")))
    own = pc.list_value_length(columns.column("texts")).to_numpy() if len(columns) else np.zeros(0, np.int64)
    starts, own_starts = columns.starts, np.cumsum(own) - own
    for size in np.unique(columns.sizes):
        for prompts in np.unique(own[columns.sizes == size]):
            rows = np.flatnonzero((columns.sizes == size) & (own == prompts))
            files = np.sort(contents[starts[rows, None] + np.arange(size)], axis=1)
            others = texts[own_starts[rows, None] + np.arange(prompts)]
            parts = [text[rows, None], others, files, sources[rows, None]]
            whole = np.ascontiguousarray(np.concatenate(parts, axis=1))
            names = whole.view(f"S{16 * whole.shape[1]}").reshape(-1)
            passes[rows[np.unique(names, return_index=True)[1]]] = True
    return passes


def _keys(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of 16-byte keys as (n,) byte strings, which numpy can sort and join."""
    return np.ascontiguousarray(halves(column).astype(">u8")).view("S16").reshape(-1)


def _no_near_duplicate(columns: Columns, distance: int) -> np.ndarray:
    """Return which groups are no near duplicate of an earlier group that passes: one of the same prompt and
    as many images, where each image of either group is within ``distance`` bits of one of the other.
    """
    passes = np.ones(len(columns), bool)
    codes = columns.prompts[1]
    if not len(columns):
        return passes
    hashes = pc.list_flatten(columns.column("hashes")).to_numpy()
    starts, sizes = columns.starts, columns.sizes
    order = np.lexsort((np.arange(len(codes)), sizes, codes))
    changes = np.flatnonzero(np.diff(codes[order]) | np.diff(sizes[order])) + 1
    firsts = np.concatenate([[0], changes])  # of each run of one prompt and one size, in the order
    lengths = np.diff(np.append(firsts, len(order)))
    for size in np.unique(sizes[order[firsts[lengths > 1]]]):
        runs = np.flatnonzero((lengths > 1) & (sizes[order[firsts]] == size))
        own = lambda rows: hashes[starts[rows, None] + np.arange(size)]  # noqa: B023, E731
        short = runs[lengths[runs] <= ROUNDS]
        for later in range(1, int(lengths[short].max(initial=0))):  # the same place of all short runs at once
            there = firsts[short[lengths[short] > later]]
            rows = order[there + later]
            near = np.zeros(len(rows), bool)
            for earlier in range(later):
                other = order[there + earlier]
                near |= passes[other] & _alike(own(other), own(rows), distance)
            passes[rows[near]] = False
        for run in runs[lengths[runs] > ROUNDS]:
            rows = order[firsts[run] : firsts[run] + lengths[run]]
            values, kept = own(rows), [0]
            for number in range(1, len(rows)):
                if _alike(values[kept], values[number], distance).any():
                    passes[rows[number]] = False
                else:
                    kept.append(number)
    return passes


def _alike(one: np.ndarray, other: np.ndarray, distance: int) -> np.ndarray:
    """Return (...,) whether two groups are near duplicates, by the (..., K) hashes of their images."""
    close = distances(one[..., :, None], other[..., None, :]) <= distance
    return np.asarray(close.any(-1).all(-1) & close.any(-2).all(-1))


def _rewards(columns: Columns) -> np.ndarray:
    """Return (m, R) the rewards of all m images of the groups, which all have R."""
    values = pc.list_flatten(pc.list_flatten(columns.column("rewards"))).to_numpy()
    return values.reshape(-1, int(columns.reward_counts[0]))


def _ends(columns: Columns, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the groups that are no ties (k,), and (k, R) rewards of the best and of the worst image of each
    by label, the first of equally good ones.
    """
    rows = np.flatnonzero(columns.kinds != "tie")
    counts, sizes = columns.reward_counts, columns.sizes
    labels = pc.list_value_length(columns.column("scores")).to_numpy() if len(columns) else sizes
    wrong = rows[(counts[rows] == 0) | (sizes[rows] < 2) | (labels[rows] != sizes[rows])]
    if len(wrong):
        at = int(wrong[0])
        missing = "there is no reward" if counts[at] == 0 else "the image has no rival"
        missing = "labels are dense" if sizes[at] > 1 and labels[at] != sizes[at] else missing
        raise UserError(
            f"{columns[at].where}: data.filters.{what} compares rivals by reward, but {missing}; name "
            f"rewards in data.rewards, or give the set a column rewards"
        )
    if not len(rows):
        return rows, np.zeros((0, 0)), np.zeros((0, 0))
    part = columns.take(rows)
    scores = pc.list_flatten(part.column("scores")).to_numpy()
    starts, group = part.starts, np.repeat(np.arange(len(part)), part.sizes)
    ends = []
    for extreme in (np.maximum, np.minimum):
        found = np.flatnonzero(scores == extreme.reduceat(scores, starts)[group])
        ends.append(_rewards(part)[found[np.unique(group[found], return_index=True)[1]]])
    return rows, ends[0], ends[1]


def agreeing(columns: Columns) -> np.ndarray:
    """Return (n,) how many rewards put each group's best image by label above the worst one; 0 of ties.

    Raises UserError if a group has no rewards or no rivals.
    """
    rows, best, worst = _ends(columns, "agree")
    found = np.zeros(len(columns), np.int64)
    found[rows] = (best > worst).sum(1)
    return found


def _agrees(columns: Columns, rewards: int) -> np.ndarray:
    return (columns.kinds == "tie") | (agreeing(columns) >= rewards)


def margin(columns: Columns) -> np.ndarray:
    """Return (n,) by how much the mean reward of each group's best image by label exceeds that of the worst
    one; 0 of ties.

    Raises UserError if a group has no rewards or no rivals.
    """
    rows, best, worst = _ends(columns, "min_margin")
    found = np.zeros(len(columns))
    if len(rows):
        found[rows] = best.mean(1) - worst.mean(1)
    return found


def _nsfw(columns: Columns, number: int) -> np.ndarray:
    """Return (n,) the highest value of one reward over each group's images."""
    few = np.flatnonzero(columns.reward_counts <= number)
    if len(few):
        at = int(few[0])
        raise UserError(
            f"{columns[at].where}: data.filters.nsfw is {number}, but an image has "
            f"{columns.reward_counts[at]} rewards, counted from 0"
        )
    if not len(columns):
        return np.zeros(0)
    return np.maximum.reduceat(_rewards(columns)[:, number], columns.starts)


def _without(columns: Columns, number: int) -> Columns:
    """Return the groups without the score of the classifier, which is no reward to learn from."""
    if not len(columns):
        return columns
    values = np.delete(_rewards(columns), number, axis=1)
    images, count = values.shape
    if not count:
        bounds, rows = np.zeros(len(columns) + 1, np.int32), pa.array([], pa.list_(pa.float64()))
    else:
        bounds = np.append(columns.starts, images).astype(np.int32)
        rows = pa.ListArray.from_arrays(
            np.arange(images + 1, dtype=np.int32) * count, pa.array(values.reshape(-1))
        )
    return columns.with_column("rewards", pa.ListArray.from_arrays(bounds, rows))
