"""Groups of some images of other groups, made from columns: no Python object for a group."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.records import SCHEMA
from diffalign.data.encoding.shards import halves

# lists with a cell for each image
_PER_IMAGE = ("images", "scores", "texts", "rewards", "patches", "votes", "hashes")


def regrouped(columns: Columns, groups: np.ndarray, picks: np.ndarray) -> Columns:
    """Return groups of k images, each of one group of ``columns``.

    A single image (k = 1) has its own prompt, no votes and no labels in time. Values that a group does not
    have (texts, rewards, patches, hashes) its parts do not have either.

    Args:
        columns: n groups.
        groups: (m,) int, in [0, n): the group of each new one.
        picks: (m, k) int: the numbers of the images in that group, in their new order.
    """
    table, rows, single = columns.whole.table, columns.rows[groups], picks.shape[1] == 1
    cells = {name: _picked(columns, name, groups, picks) for name in _PER_IMAGE}
    for name in SCHEMA.names:
        if name not in cells:
            cells[name] = table[name].take(pa.array(rows))
    if single:
        own = pc.list_value_length(cells["texts"]).to_numpy(zero_copy_only=False) > 0
        if own.any():
            first = pc.list_flatten(cells["texts"]).take(pa.array(np.cumsum(own) - 1, mask=~own))
            cells["text"] = pc.coalesce(first, cells["text"])
        for name in ("texts", "votes"):
            cells[name] = _lists(np.zeros(len(rows), bool), picks, pc.list_flatten(table[name])[:0])
    cells["dense"] = _dense(columns, groups, picks)
    return Columns(pa.table({name: cells[name] for name in SCHEMA.names}).cast(SCHEMA))


def identities(columns: Columns, groups: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Return (m,) int: the number of each image with its prompt, equal for equal ones, in the order of their
    first occurrence.

    Args:
        columns: n groups.
        groups: (m,) int: the group of each image.
        picks: (m, 1) int: the number of each image in its group.
    """
    table, rows = columns.whole.table, columns.rows[groups]
    digests = halves(pc.struct_field(pc.list_flatten(table["images"]), "content"))
    content = digests[columns.cells("images", groups, picks)[:, 0]]
    text = halves(table["text"])[rows]
    own = columns.text_counts[groups] > 0
    if own.any():
        texts = halves(pc.list_flatten(table["texts"]))
        text[own] = texts[columns.cells("texts", groups[own], picks[own])[:, 0]]
    raw = np.ascontiguousarray(np.concatenate([content, text], axis=1))
    keys = pa.Array.from_buffers(pa.binary(32), len(raw), [None, pa.py_buffer(raw)])
    return np.asarray(keys.dictionary_encode().indices.to_numpy())


def _picked(columns: Columns, name: str, groups: np.ndarray, picks: np.ndarray) -> pa.Array:
    column = columns.whole.table[name]
    there = pc.list_value_length(column).to_numpy()[columns.rows[groups]] > 0
    at = columns.cells(name, groups[there], picks[there]).reshape(-1)
    return _lists(there, picks, pc.list_flatten(column).take(pa.array(at)))


def _lists(there: np.ndarray, picks: np.ndarray, values: pa.ChunkedArray) -> pa.Array:
    """Return lists of k values where ``there``, empty ones elsewhere."""
    ends = np.cumsum(np.where(there, picks.shape[1], 0))
    array = values.combine_chunks()
    return pa.LargeListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int64), array)


def _dense(columns: Columns, groups: np.ndarray, picks: np.ndarray) -> pa.Array:
    """Return the labels in time of the new groups as cells; only groups that have some are read."""
    cells: list[str | None] = [None] * len(groups)
    for new in np.flatnonzero(columns.has_dense[groups]):
        label = columns[int(groups[new])].dense
        part = label.of(picks[new].tolist()) if label else None
        cells[new] = None if part is None else json.dumps(asdict(part))
    return pa.array(cells, pa.large_string())
