"""The rewards that a run names, as encoding asks for them: image files and prompts in, rows of scores out."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from diffalign.rewards.scoring.cache import ScoreCache, reward_key
from diffalign.rewards.scoring.items import Item
from diffalign.rewards.scoring.score import Scorer, make_scorers, score_column


class RewardRater:
    """Several rewards as a ``data.encoding.rating.Rater``: loaded when the first image comes, scored once."""

    def __init__(self, specs: Sequence[str], cache: Path | str, device: str = "cpu", dtype: str = "float32"):
        """``specs``: see ``rewards.load``; ``cache``: the file that keeps the scores."""
        self._specs, self._device, self._dtype = tuple(specs), device, dtype
        self._cache = Path(cache)

    @property
    def fingerprint(self) -> str:
        """Changes with the rewards, their order, the weights behind them and their precision."""
        parts = [*(reward_key(spec) for spec in self._specs), self._dtype]
        return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).hexdigest()

    def __call__(self, images: Sequence[bytes], prompts: Sequence[str]) -> list[tuple[float, ...]]:
        """Return a row of scores for each of the image files; UserError for what a reward cannot read."""
        scorers, cache = self._loaded
        items = [Item(prompt, image, ()) for image, prompt in zip(images, prompts, strict=True)]
        return list(zip(*(score_column(items, scorer, cache) for scorer in scorers), strict=True))

    @cached_property
    def _loaded(self) -> tuple[list[Scorer], ScoreCache]:
        return make_scorers(self._specs, self._device, self._dtype), ScoreCache(self._cache)
