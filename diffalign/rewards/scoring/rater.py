"""Rewards as the ``Rater`` of encoding: image files and prompts in, rows of scores out."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from diffalign.rewards.scoring.cache import ScoreCache, reward_key
from diffalign.rewards.scoring.items import Item
from diffalign.rewards.scoring.score import Scorer, make_scorers, score_column


class RewardRater:
    """Several rewards as a ``data.encoding.rating.Rater``, loaded at the first call, with cached scores."""

    def __init__(self, specs: Sequence[str], cache: Path | str, device: str = "cpu", dtype: str = "float32"):
        """Take reward specs (see ``rewards.load``), the score cache's file, device and dtype."""
        self._specs, self._device, self._dtype = tuple(specs), device, dtype
        self._cache = Path(cache)

    @property
    def fingerprint(self) -> str:
        """A digest of the rewards, their order, their weight files and their precision."""
        parts = [*(reward_key(spec) for spec in self._specs), self._dtype]
        return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).hexdigest()

    def __call__(self, images: Sequence[bytes], prompts: Sequence[str]) -> list[tuple[float, ...]]:
        """Return one row of scores, in the order of the specs, for each encoded image.

        Raises:
            UserError: a reward cannot read a prompt, or gives a score that is not finite.
        """
        scorers, cache = self._loaded
        items = [Item(prompt, image, ()) for image, prompt in zip(images, prompts, strict=True)]
        return list(zip(*(score_column(items, scorer, cache) for scorer in scorers), strict=True))

    @cached_property
    def _loaded(self) -> tuple[list[Scorer], ScoreCache]:
        return make_scorers(self._specs, self._device, self._dtype), ScoreCache(self._cache)
