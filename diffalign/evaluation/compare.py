"""A comparison that notebooks show as pictures: ``compare(base, aligned, prompts, rewards)``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from diffalign.evaluation.charts import number
from diffalign.evaluation.embedding import tag
from diffalign.evaluation.evaluate import Evaluation, evaluate
from diffalign.evaluation.media import MediaLike
from diffalign.evaluation.sections import verdict
from diffalign.types import Reward

_STYLE = (
    "<style>.diffalign { display: flex; flex-wrap: wrap; gap: 16px; } "
    ".diffalign .tiny { image-rendering: pixelated; }</style>"
)


@dataclass(frozen=True)
class NotebookComparison:
    """Pairs of images or videos, their prompts and, if there are rewards, the evaluation: a grid."""

    base: tuple[MediaLike, ...] = field(repr=False)
    aligned: tuple[MediaLike, ...] = field(repr=False)
    prompts: tuple[str, ...] = field(repr=False)
    evaluation: Evaluation | None
    shown: int = 12

    def _repr_html_(self) -> str:
        """The first ``shown`` pairs with their scores, and the verdict above them."""
        cells = "".join(self._cell(i) for i in range(min(self.shown, len(self.prompts))))
        words = ""
        if self.evaluation is not None:
            headline, support = verdict(self.evaluation)
            words = f"<p><b>{escape(headline)}</b> {escape(support)}</p>"
        return f'{_STYLE}{words}<div class="diffalign">{cells}</div>'

    def _cell(self, i: int) -> str:
        images = []
        for side, source in (("base", self.base[i]), ("aligned", self.aligned[i])):
            shows = tag(source, f"{side}: {self.prompts[i]}", 'style="display:block;width:128px;height:auto"')
            images.append(f'<div style="font-size:12px">{shows}{side}{self._scores(side, i)}</div>')
        return (
            f'<div style="width:264px"><div style="display:flex;gap:8px">{"".join(images)}</div>'
            f'<div style="font-size:13px;margin-top:4px">{escape(self.prompts[i])}</div></div>'
        )

    def _scores(self, side: str, i: int) -> str:
        if self.evaluation is None:
            return ""
        values = [
            f"{r.name} {number((r.base_scores if side == 'base' else r.aligned_scores)[i])}"
            for r in self.evaluation.rewards
        ]
        return "".join(f"<br>{escape(value)}" for value in values)


def compare(
    base: Sequence[MediaLike],
    aligned: Sequence[MediaLike],
    prompts: Sequence[str],
    rewards: Mapping[str, Reward] | None = None,
    *,
    shown: int = 12,
    seed: int = 0,
) -> NotebookComparison:
    """Compare N pairs of images or videos, with scores if ``rewards`` are given; see ``evaluate``."""
    evaluation = evaluate(base, aligned, prompts, rewards, seed=seed, progress=False) if rewards else None
    return NotebookComparison(tuple(base), tuple(aligned), tuple(prompts), evaluation, shown)
