"""The report's pairs of pictures: their choice and their orders."""

import random
from collections.abc import Mapping, Sequence
from html import escape

from diffalign.evaluation.contest import Contest
from diffalign.evaluation.evaluate import Evaluation
from diffalign.evaluation.report.charts import number
from diffalign.evaluation.report.embedding import tag
from diffalign.evaluation.report.page import section, stack

_OF_CATEGORY = 2  # of the largest gains of every category, and of the largest losses


def choose(
    gains: Sequence[float], shown: int, seed: int, categories: Mapping[str, Sequence[str]] | None = None
) -> dict[int, dict[str, int]]:
    """Return the pairs to show, and their rank in each order: ``gain``, ``loss`` (worst first) and
    ``random``.

    Some pairs of every category are included, without a rank.
    """
    order = sorted(range(len(gains)), key=lambda i: (-gains[i], i))
    orders = {
        "gain": order[:shown],
        "loss": order[::-1][:shown],
        "random": random.Random(seed).sample(range(len(gains)), min(shown, len(gains))),
    }
    chosen: dict[int, dict[str, int]] = {}
    for name, indices in orders.items():
        for rank, i in enumerate(indices):
            chosen.setdefault(i, {})[name] = rank
    for values in (categories or {}).values():
        for category in dict.fromkeys(value for value in values if value):
            own = [i for i in order if values[i] == category]
            for i in own[:_OF_CATEGORY] + own[-_OF_CATEGORY:]:
                chosen.setdefault(i, {})
    return chosen


def pairs(contest: Contest, shown: int) -> str:
    """Return pairs of images or videos with prompt and scores, of every model, with controls to order and
    filter them."""
    bodies, count = {}, 0
    for name, evaluation in contest.evaluations.items():
        first = evaluation.primary
        gains = [
            after - before for before, after in zip(first.base_scores, first.aligned_scores, strict=True)
        ]
        chosen = choose(gains, shown, evaluation.seed, contest.categories)
        figures = [_figure(contest, name, i, chosen[i]) for i in sorted(chosen, key=lambda i: (-gains[i], i))]
        bodies[name] = f'<div class="pairs">{"".join(figures)}</div>'
        count = max(count, len(figures))
    kind, total = contest.leading.kind, len(contest.leading.prompts)
    lead = f"Base left, aligned right, from the same noise. {count} of {total} pairs of {kind} are here. "
    lead += "Gains and losses are chosen by score and show the extremes, so look at the random ones first."
    if contest.leading.motion:
        lead += " Playing one plays its rival as well."
    return section("Side by side", lead, _controls(contest) + stack(bodies))


def _controls(contest: Contest) -> str:
    buttons = "".join(
        f'<button type="button" data-order="{order}" aria-pressed="false">{text}</button>'
        for order, text in (("random", "Random"), ("gain", "Largest gains"), ("loss", "Largest losses"))
    )
    if contest.leading.motion:
        buttons += '<button type="button" data-play aria-pressed="false">Play all</button>'
    if contest.categories:
        groups = "".join(
            f'<optgroup label="{escape(axis, quote=True)}">'
            + "".join(
                f'<option value="{escape(_label(axis, value), quote=True)}">{escape(value)}</option>'
                for value in dict.fromkeys(value for value in values if value)
            )
            + "</optgroup>"
            for axis, values in contest.categories.items()
        )
        buttons += f'<select aria-label="Category"><option value="">All categories</option>{groups}</select>'
    return f'<div class="buttons">{buttons}</div>'


def _label(axis: str, value: str) -> str:
    return f"{axis}: {value}"


def _figure(contest: Contest, name: str, i: int, ranks: Mapping[str, int]) -> str:
    evaluation = contest.evaluations[name]
    first, prompt = evaluation.primary, evaluation.prompts[i]
    gain = first.aligned_scores[i] - first.base_scores[i]
    sides = []
    for side, source, scores in (
        ("base", contest.base[i], first.base_scores),
        ("aligned", contest.aligned[name][i], first.aligned_scores),
    ):
        shows = tag(source, f"{side} model: {prompt}")
        sides.append(f"<div>{shows}<span>{side}<b>{number(scores[i])}</b></span></div>")
    kind = "up" if gain > 0 else "down" if gain < 0 else ""
    known = [_label(axis, values[i]) for axis, values in contest.categories.items() if values[i]]
    data = "".join(f' data-{order}="{rank}"' for order, rank in ranks.items())
    data += f' data-change="{gain:.6g}"'
    data += f' data-of="{escape(chr(10).join(known), quote=True)}"' if known else ""
    return (
        f'<figure class="pair card"{data}><div '
        f'class="images">{"".join(sides)}</div><figcaption>{escape(prompt)}'
        f'<small><b class="{kind}">{number(gain, sign=True)}</b> {escape(first.name)}'
        f"{_others(evaluation, i)}</small></figcaption></figure>"
    )


def _others(evaluation: Evaluation, i: int) -> str:
    others = ", ".join(
        f"{r.name} {number(r.base_scores[i])} → {number(r.aligned_scores[i])}" for r in evaluation.rewards[1:]
    )
    return f"; {escape(others)}" if others else ""
