"""A comparison that notebooks show as pictures: ``compare(base, aligned, prompts, rewards)``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from diffalign.evaluation.charts import number
from diffalign.evaluation.evaluate import Evaluation, ImageLike, evaluate
from diffalign.evaluation.grids import TINY, embed
from diffalign.evaluation.sampling import open_image
from diffalign.evaluation.sections import verdict
from diffalign.types import Reward


@dataclass(frozen=True)
class NotebookComparison:
    """Pairs of images, their prompts and, if there are rewards, the evaluation; a grid in notebooks."""

    base: tuple[ImageLike, ...] = field(repr=False)
    aligned: tuple[ImageLike, ...] = field(repr=False)
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
        return f'{words}<div style="display:flex;flex-wrap:wrap;gap:16px">{cells}</div>'

    def _cell(self, i: int) -> str:
        images = []
        for side, source in (("base", self.base[i]), ("aligned", self.aligned[i])):
            image = open_image(source)
            uri, _ = embed(image)
            style = "image-rendering:pixelated;" if max(image.size) <= TINY else ""
            images.append(
                f'<div style="font-size:12px"><img src="{uri}" width="128" '
                f'style="{style}display:block;height:auto" '
                f'alt="{escape(f"{side}: {self.prompts[i]}")}">{side}{self._scores(side, i)}</div>'
            )
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
    base: Sequence[ImageLike],
    aligned: Sequence[ImageLike],
    prompts: Sequence[str],
    rewards: Mapping[str, Reward] | None = None,
    *,
    shown: int = 12,
    seed: int = 0,
) -> NotebookComparison:
    """Compare N pairs of images, with scores if ``rewards`` are given; raises what ``evaluate`` raises."""
    evaluation = evaluate(base, aligned, prompts, rewards, seed=seed, progress=False) if rewards else None
    return NotebookComparison(tuple(base), tuple(aligned), tuple(prompts), evaluation, shown)
