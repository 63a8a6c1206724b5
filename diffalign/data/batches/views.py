"""Views of an encoded set: rivals two by two, single likes, demonstrations, one label from dense ones.

A view regroups the images of the set; nothing is encoded for it, so pairs and likes of one set share a cache.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations

from diffalign.config.schema import DataConfig
from diffalign.data.encoding.encoded import EncodedSet, Record
from diffalign.errors import UserError


def viewed(encoded: EncodedSet, config: DataConfig) -> EncodedSet:
    """Return the set in the form of ``config.view``; UserError if it has no such form."""
    if config.best is not None and config.view != "demonstrations":
        raise UserError(f"data.best is {config.best}; it is for data.view demonstrations, not {config.view}")
    if config.view == "pairs":
        if len(encoded) and (encoded.records.sizes == 2).all():
            return encoded  # unchanged: no record is made
        return encoded.holding(_pairs(encoded))
    if config.view == "majority":
        return encoded.holding(replace(record, scores=_votes(record), dense=None) for record in encoded)
    if config.view == "likes":
        return encoded.holding(_likes(encoded))
    if config.view == "demonstrations" and config.best is not None:
        return encoded.holding(_experts(encoded, config.best))
    if config.view == "demonstrations":
        return encoded.holding(like for like in _likes(encoded) if like.scores[0] > 0)
    return encoded


def _pairs(records: Iterable[Record]) -> Iterator[Record]:
    """Return every two rivals; equal ones of a longer list are left out."""
    for record in records:
        if len(record.images) < 2:
            raise UserError(
                f"{record.where}: data.view is pairs, but the image has no rival; allowed: auto, likes, "
                f"demonstrations"
            )
        for two in combinations(range(len(record.images)), 2):
            pair = _part(record, two)
            if len(record.images) == 2 or not pair.is_tie:
                yield pair


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


def _likes(records: Iterable[Record]) -> list[Record]:
    """Return each image of a prompt once: liked if it was the best of any group, otherwise disliked.

    Diffusion-KTO's reading of pairs (Li et al. 2024, arXiv 2404.04465, released code: the win of any pair
    counts). Ties carry no label, and images that occur in ties only are left out.
    """
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        if record.is_tie:
            continue
        best = max(record.scores)
        for index, single in enumerate(_singles(record)):
            liked = single.scores[0] > 0 if len(record.images) == 1 else record.scores[index] == best
            key = single.images[0].content, single.text
            earlier = found.setdefault(key, replace(single, scores=(float(liked),)))
            if liked and not earlier.scores[0]:
                found[key] = replace(earlier, scores=(1.0,))
    return list(found.values())


def _experts(records: Iterable[Record], number: int) -> list[Record]:
    """Return the images with the highest rewards, whatever their labels.

    Source: Diffusion-DRO, arXiv 2510.18353.
    With several rewards, those with the highest sum of ranks. Equally good ones keep the order of the set.
    """
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        if not record.rewards:
            raise UserError(
                f"{record.where}: data.best is {number}, but there is no reward to find the best by; "
                f"name one in data.rewards, or give the set a column rewards"
            )
        for single in _singles(record):
            found.setdefault((single.images[0].content, single.text), replace(single, scores=(1.0,)))
    columns = [sorted(column) for column in zip(*(r.rewards[0] for r in found.values()), strict=True)]
    every = list(found.values())
    ranks = [sum(map(bisect_left, columns, single.rewards[0])) for single in every]
    chosen = sorted(range(len(every)), key=lambda index: -ranks[index])[:number]
    return [every[index] for index in sorted(chosen)]


def _singles(record: Record) -> Iterator[Record]:
    return (_part(record, (index,)) for index in range(len(record.images)))


def _part(record: Record, images: tuple[int, ...]) -> Record:
    """Return a group with some of the images."""
    pick = lambda values: tuple(values[index] for index in images) if values else ()  # noqa: E731
    part = replace(
        record,
        images=pick(record.images),
        scores=pick(record.scores),
        texts=pick(record.texts),
        rewards=pick(record.rewards),
        patches=pick(record.patches),
        dense=record.dense.of(images) if record.dense else None,
        votes=pick(record.votes) if len(images) > 1 else (),
        hashes=pick(record.hashes),
    )
    return replace(part, text=part.texts[0], texts=()) if record.texts and len(images) == 1 else part
