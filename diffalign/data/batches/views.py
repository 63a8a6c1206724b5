"""Views of an encoded set: rivals two by two, single likes, demonstrations, one label from dense ones.

A view regroups the images of the set; nothing is encoded for it, so pairs and likes of one set share a cache.
Views are made from columns, since a set may have millions of groups.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffalign.config.schema import DataConfig
from diffalign.data.batches.regroup import identities, regrouped
from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.encoded import EncodedSet, Record
from diffalign.errors import UserError


def viewed(encoded: EncodedSet, config: DataConfig) -> EncodedSet:
    """Return the set in the form of ``config.view``; UserError if it has no such form."""
    if config.best is not None and config.view != "demonstrations":
        raise UserError(f"data.best is {config.best}; it is for data.view demonstrations, not {config.view}")
    records = encoded.records
    if config.view == "pairs":
        unchanged = len(records) > 0 and (records.sizes == 2).all()
        return encoded if unchanged else encoded.holding(_pairs(records))
    if config.view == "majority":
        if not records.has_dense.any():
            return encoded.holding(records)
        return encoded.holding(replace(record, scores=_votes(record), dense=None) for record in encoded)
    if config.view == "likes":
        return encoded.holding(_likes(records))
    if config.view == "demonstrations" and config.best is not None:
        return encoded.holding(_experts(records, config.best))
    if config.view == "demonstrations":
        likes = _likes(records)
        return encoded.holding(likes.take(np.flatnonzero(likes.first_scores > 0)))
    return encoded


def _pairs(records: Columns) -> Columns:
    """Return every two rivals; equal ones of a longer list are left out."""
    alone = np.flatnonzero(records.sizes < 2)
    if len(alone):
        raise UserError(
            f"{records[int(alone[0])].where}: data.view is pairs, but the image has no rival; allowed: auto, "
            f"likes, demonstrations"
        )
    groups, picks = np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
    for size in np.unique(records.sizes):
        twos = np.array(list(combinations(range(size), 2)))
        those = np.flatnonzero(records.sizes == size)
        groups = np.concatenate([groups, np.repeat(those, len(twos))])
        picks = np.concatenate([picks, np.tile(twos, (len(those), 1))])
    order = np.argsort(groups, kind="stable")
    pairs = regrouped(records, groups[order], picks[order])
    return pairs.take(np.flatnonzero((records.sizes[groups[order]] == 2) | (pairs.kinds != "tie")))


def _votes(record: Record) -> tuple[float, ...]:
    """Return the number of won comparisons of each video, over segments and rivals: for a pair a majority
    vote, as in DenseDPO's baselines (arXiv 2506.03517). A group without dense labels keeps its scores.
    """
    if not record.dense:
        return record.scores
    segments = list(zip(*record.dense.scores, strict=True))
    return tuple(
        float(sum(at[video] > other for at in segments for other in at))
        for video in range(len(record.images))
    )


def _likes(records: Columns) -> Columns:
    """Return each image of a prompt once: liked if it was the best of any group, otherwise disliked.

    Diffusion-KTO's reading of pairs (Li et al. 2024, arXiv 2404.04465, released code: the win of any pair
    counts). Ties carry no label, and images that occur in ties only are left out.
    """
    groups, picks = records.every_image(np.flatnonzero(records.kinds != "tie"))
    highest = records.first_scores.copy()
    every = pc.list_flatten(records.whole.table["scores"]).to_numpy()
    scores = every[records.cells("scores", groups, picks)[:, 0]]
    np.maximum.at(highest, groups, scores)
    best = np.where(records.sizes[groups] == 1, scores > 0, scores == highest[groups])
    numbers = identities(records, groups, picks)
    first = np.unique(numbers, return_index=True)[1]
    liked = np.bincount(numbers, weights=best, minlength=len(first)) > 0
    return _labelled(regrouped(records, groups[first], picks[first]), liked.astype(np.float64))


def _experts(records: Columns, number: int) -> Columns:
    """Return the images with the highest rewards, whatever their labels.

    Source: Diffusion-DRO, arXiv 2510.18353.
    With several rewards, those with the highest sum of ranks. Equally good ones keep the order of the set.
    """
    without = np.flatnonzero(records.reward_counts == 0)
    if len(without):
        raise UserError(
            f"{records[int(without[0])].where}: data.best is {number}, but there is no reward to find the "
            f"best by; name one in data.rewards, or give the set a column rewards"
        )
    if len(counts := np.unique(records.reward_counts)) > 1:
        raise UserError(
            f"data.best is {number}, but images have {counts.tolist()} rewards; allowed: one number"
        )
    groups, picks = records.every_image(np.arange(len(records)))
    first = np.unique(identities(records, groups, picks), return_index=True)[1]
    singles = regrouped(records, groups[first], picks[first])
    flat = pc.list_flatten(pc.list_flatten(singles.column("rewards"))).to_numpy()
    ranks = np.zeros(len(singles), np.int64)
    for rewards in flat.reshape(len(singles), -1).T:
        ranks += np.searchsorted(np.sort(rewards), rewards)
    chosen = np.sort(np.argsort(-ranks, kind="stable")[:number])
    return _labelled(singles.take(chosen), np.ones(len(chosen)))


def _labelled(singles: Columns, scores: np.ndarray) -> Columns:
    """Return single images with these scores (n,)."""
    offsets = np.arange(len(scores) + 1, dtype=np.int32)
    return singles.with_column("scores", pa.ListArray.from_arrays(offsets, pa.array(scores)))
