"""Filters of an encoded set: each leaves groups out and counts them (``Counts.filtered``).

A group is left out by the first filter that it does not pass, in the order of ``FilterConfig``. Rewards are
those that a set has or that ``data.rewards`` adds.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from diffalign.config.schema import FilterConfig
from diffalign.data.encoding.encoded import EncodedSet
from diffalign.data.encoding.records import Record
from diffalign.errors import UserError


def filtered(encoded: EncodedSet, config: FilterConfig) -> EncodedSet:
    """Return the groups that pass every filter.

    Raises UserError if a filter needs rewards or rivals that a group does not have.
    """
    keep = np.ones(len(encoded), bool)
    removed: list[tuple[str, int]] = []
    for name, passes in _filters(config):
        before = int(keep.sum())
        keep &= passes(encoded)
        removed.append((name, before - int(keep.sum())))
    if not removed:
        return encoded
    left = encoded.subset(np.flatnonzero(keep))
    if config.nsfw is not None:
        left = left.holding(_without(record, config.nsfw) for record in left)
    return left.counted(replace(left.counts, filtered=tuple(removed)))


def _filters(config: FilterConfig) -> Iterator[tuple[str, Callable[[EncodedSet], np.ndarray]]]:
    """Yield the filters that are set: a name, and what says which groups pass."""
    if config.words:
        words = [word.casefold() for word in config.words]
        yield "words", lambda e: _of_prompts(e, lambda p: not any(word in p.casefold() for word in words))
    if config.min_prompt or config.max_prompt is not None:
        low, high = config.min_prompt, config.max_prompt
        fits = lambda prompt: low <= len(prompt) and (high is None or len(prompt) <= high)  # noqa: E731
        yield "prompt length", lambda e: _of_prompts(e, fits)
    if config.min_side:
        yield "size", lambda e: _each(e, lambda r: min(_sides(r)) >= config.min_side)
    if config.repeats:
        yield "repeats", _first_of_their_kind
    if config.nsfw is not None:
        yield "nsfw", lambda e: _each(e, lambda r: _nsfw(r, config) <= config.max_nsfw)
    if config.agree:
        yield "agreement", lambda e: _each(e, lambda r: r.is_tie or agreeing(r) >= config.agree)
    if config.min_margin:
        yield "margin", lambda e: _each(e, lambda r: r.is_tie or margin(r) >= config.min_margin)


def _each(encoded: EncodedSet, passes: Callable[[Record], bool]) -> np.ndarray:
    return np.fromiter(map(passes, encoded), bool, len(encoded))


def _of_prompts(encoded: EncodedSet, passes: Callable[[str], bool]) -> np.ndarray:
    prompts, codes = encoded.records.prompts
    return np.array([passes(prompt) for prompt in prompts], bool)[codes]


def _sides(record: Record) -> list[int]:
    return [side for image in record.images for side in image.cut.original]


def _first_of_their_kind(encoded: EncodedSet) -> np.ndarray:
    """Return which groups have another prompt or other image files than every earlier group."""
    seen: set[tuple[str, ...]] = set()
    passes = np.ones(len(encoded), bool)
    for index, record in enumerate(encoded):
        name = (record.text, *record.texts, *sorted(image.content for image in record.images))
        passes[index] = name not in seen
        seen.add(name)
    return passes


def _ends(record: Record, what: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the rewards of the best image and of the worst one by label."""
    if not record.rewards or len(record.images) < 2:
        missing = "there is no reward" if not record.rewards else "the image has no rival"
        raise UserError(
            f"{record.where}: data.filters.{what} compares rivals by reward, but {missing}; name rewards in "
            f"data.rewards, or give the set a column rewards"
        )
    best = max(range(len(record.scores)), key=lambda at: record.scores[at])
    worst = min(range(len(record.scores)), key=lambda at: record.scores[at])
    return record.rewards[best], record.rewards[worst]


def agreeing(record: Record) -> int:
    """Return how many rewards put the best image by label above the worst one."""
    return sum(one > other for one, other in zip(*_ends(record, "agree"), strict=True))


def margin(record: Record) -> float:
    """Return by how much the mean reward of the best image by label exceeds that of the worst one."""
    best, worst = _ends(record, "min_margin")
    return sum(best) / len(best) - sum(worst) / len(worst)


def _nsfw(record: Record, config: FilterConfig) -> float:
    number = config.nsfw or 0
    if not record.rewards or number >= len(record.rewards[0]):
        known = len(record.rewards[0]) if record.rewards else 0
        raise UserError(
            f"{record.where}: data.filters.nsfw is {number}, but an image has {known} rewards, counted from 0"
        )
    return max(row[number] for row in record.rewards)


def _without(record: Record, number: int) -> Record:
    """Return the record without the score of the classifier, which is no reward to learn from."""
    rows = tuple(row[:number] + row[number + 1 :] for row in record.rewards)
    return replace(record, rewards=rows if rows and rows[0] else ())
