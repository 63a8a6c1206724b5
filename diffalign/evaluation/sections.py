"""The sections of the report, each a function from results to HTML. What comes from outside is escaped."""

import random
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from diffalign.evaluation.charts import histogram, interval_bar, number, outcome_bar
from diffalign.evaluation.embedding import tag
from diffalign.evaluation.evaluate import MIN_PROMPTS, Evaluation
from diffalign.evaluation.image_statistics import StatisticChange
from diffalign.evaluation.media import MediaLike
from diffalign.evaluation.motion import DYNAMIC
from diffalign.evaluation.page import LEGEND, section, table
from diffalign.evaluation.statistics import Estimate


def _range(estimate: Estimate, digits: int = 3) -> str:
    return f"{number(estimate.low, digits, True)} to {number(estimate.high, digits, True)}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def verdict(evaluation: Evaluation) -> tuple[str, str]:
    """The verdict as a headline and the sentence that supports it, as plain text."""
    name, comparison = evaluation.primary.name, evaluation.primary.comparison
    pairs = len(evaluation.prompts)
    on = f"{comparison.prompts} prompts"
    if pairs != comparison.prompts:
        on += f" ({pairs} pairs of {evaluation.kind})"
    change = f"{number(comparison.gain.value, sign=True)} (95 % interval {_range(comparison.gain)})"
    headline = {
        "better": "The aligned model is better.",
        "worse": "The aligned model is worse.",
        "no difference shown": "No difference shown.",
        "too few prompts": "Too few prompts to tell.",
    }[evaluation.verdict]
    support = (
        f"By {name}, the mean score changes by {change} on {on}, drawn by both models from the same noise."
    )
    if evaluation.verdict == "no difference shown":
        support += " The interval includes zero: more prompts, or more training, would be needed to tell."
    if evaluation.verdict == "too few prompts":
        support += f" An interval needs at least {MIN_PROMPTS} prompts; a hundred and more tell something."
    if evaluation.alarm:
        support += " Read the warning below before you trust it."
    return headline, support


def head(evaluation: Evaluation, title: str) -> str:
    """Title, verdict and its support."""
    headline, support = verdict(evaluation)
    return (
        f'<header>\n<p class="eyebrow">{escape(title)}</p>\n<h1>{escape(headline)}</h1>\n'
        f'<p class="lead">{escape(support)}</p>\n</header>'
    )


def _number(what: str, value: str, more: str, kind: str = "") -> str:
    return (
        f'<div class="card number"><div class="what">{escape(what)}</div>'
        f'<div class="value {kind}">{escape(value)}</div><div class="more">{escape(more)}</div></div>'
    )


def duration(seconds: float) -> str:
    """``52 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def numbers(evaluation: Evaluation, train_seconds: float | None, steps: int | None) -> str:
    """The big numbers of the primary reward."""
    name, comparison = evaluation.primary.name, evaluation.primary.comparison
    kind = {"better": "good", "worse": "bad"}.get(evaluation.verdict, "")
    cards = [
        _number(
            f"mean {name}", f"{number(comparison.base)} → {number(comparison.aligned)}", "base → aligned"
        ),
        _number("gain", number(comparison.gain.value, sign=True), f"95 %: {_range(comparison.gain)}", kind),
        _number(
            "win rate",
            _percent(comparison.win_rate.value),
            f"95 %: {_percent(comparison.win_rate.low)} to {_percent(comparison.win_rate.high)}",
        ),
    ]
    for change in evaluation.motion[:1]:
        values = f"{number(change.base, 2)} → {number(change.aligned, 2)}"
        cards.append(_number("dynamic degree", values, f"change, 95 %: {_range(change.change)}"))
    if train_seconds is not None:
        cards.append(
            _number("training", duration(train_seconds), f"{steps} steps" if steps is not None else "")
        )
    return f'<div class="numbers">{"".join(cards)}</div>'


def alarm(evaluation: Evaluation) -> str:
    """The warnings, if there are any."""
    if not evaluation.alarm:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in evaluation.alarm)
    return (
        f'<div class="alarm" role="alert"><strong>Possible over-optimisation</strong><ul>{items}</ul></div>'
    )


def rewards(evaluation: Evaluation) -> str:
    """Every reward: gain and win rate with intervals, wins, ties and losses."""
    rows = []
    for result in evaluation.rewards:
        c = result.comparison
        reach = max(abs(c.gain.low), abs(c.gain.high), 1e-12) * 1.15
        gain = interval_bar(f"gain {number(c.gain.value)}, {_range(c.gain)}", c.gain, -reach, reach, 0.0)
        rate = interval_bar(f"win rate {_percent(c.win_rate.value)}", c.win_rate, 0.0, 1.0, 0.5)
        parts = outcome_bar(f"{c.wins} wins, {c.ties} ties, {c.losses} losses", c.wins, c.ties, c.losses)
        rows.append(
            f'<div class="card reward"><div><h3>{escape(result.name)}</h3>'
            f"<p>{number(c.base)} → {number(c.aligned)}</p></div>"
            f"<div><p>gain <b>{number(c.gain.value, sign=True)}</b> ({_range(c.gain)})</p><div "
            f'class="bar">{gain}</div>'
            f"<p>{_p_value(c.p_value)}</p></div>"
            f"<div><p>wins <b>{_percent(c.win_rate.value)}</b> ({_percent(c.win_rate.low)} to "
            f'{_percent(c.win_rate.high)})</p><div class="bar">{rate}</div><div class="bar">{parts}</div>'
            f"<p>{c.wins} wins, {c.ties} ties, {c.losses} losses</p></div></div>"
        )
    lead = "Differences on the same prompts and noise, with 95 % intervals from resampling whole prompts. "
    lead += "Ties count half; the dashed mark is no difference. The first reward gives the verdict."
    return section("By reward", lead, "\n".join(rows))


def _p_value(p: float) -> str:
    return "p &lt; 0.001" if p < 0.001 else f"p = {p:.3f}"


def choose(gains: Sequence[float], shown: int, seed: int) -> dict[int, dict[str, int]]:
    """Which pairs to show, and their rank in each order: ``gain``, ``loss`` (worst first) and ``random``."""
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
    return chosen


def pairs(evaluation: Evaluation, base: Sequence[MediaLike], aligned: Sequence[MediaLike], shown: int) -> str:
    """Pairs of images or videos with prompt and scores, sorted by three buttons."""
    first = evaluation.primary
    gains = [after - before for before, after in zip(first.base_scores, first.aligned_scores, strict=True)]
    chosen = choose(gains, shown, evaluation.seed)
    figures = []
    for i in sorted(chosen, key=lambda i: -gains[i]):
        prompt = evaluation.prompts[i]
        sides = []
        for side, source, scores in (
            ("base", base[i], first.base_scores),
            ("aligned", aligned[i], first.aligned_scores),
        ):
            shows = tag(source, f"{side} model: {prompt}")
            sides.append(f"<div>{shows}<span>{side}<b>{number(scores[i])}</b></span></div>")
        others = ", ".join(
            f"{r.name} {number(r.base_scores[i])} → {number(r.aligned_scores[i])}"
            for r in evaluation.rewards[1:]
        )
        kind = "up" if gains[i] > 0 else "down" if gains[i] < 0 else ""
        ranks = " ".join(f'data-{name}="{rank}"' for name, rank in chosen[i].items())
        figures.append(
            f'<figure class="pair card" {ranks}><div '
            f'class="images">{"".join(sides)}</div><figcaption>{escape(prompt)}'
            f'<small><b class="{kind}">{number(gains[i], sign=True)}</b> {escape(first.name)}'
            f"{'; ' + escape(others) if others else ''}</small></figcaption></figure>"
        )
    buttons = "".join(
        f'<button type="button" data-order="{order}" aria-pressed="false">{text}</button>'
        for order, text in (("random", "Random"), ("gain", "Largest gains"), ("loss", "Largest losses"))
    )
    lead = f"Base left, aligned right, from the same noise. {len(figures)} of {len(gains)} pairs are here. "
    lead += "Gains and losses are chosen by score and show the extremes, so look at the random ones first."
    if evaluation.motion:
        lead += " Playing one plays its rival as well."
        buttons += '<button type="button" data-play aria-pressed="false">Play all</button>'
    body = f'<div class="buttons">{buttons}</div><div class="pairs">{"".join(figures)}</div>'
    return section("Side by side", lead, body)


def distributions(evaluation: Evaluation) -> str:
    """A histogram of every reward's scores."""
    cards = "".join(
        f'<div class="card"><h3>{escape(r.name)}</h3>'
        f"{histogram(f'scores of {r.name}', r.base_scores, r.aligned_scores)}{LEGEND}</div>"
        for r in evaluation.rewards
    )
    lead = f"How the scores of single {evaluation.kind} are spread; dotted lines are the means."
    return section("Scores", lead, f'<div class="charts">{cards}</div>')


def _changes(changes: Sequence[StatisticChange]) -> str:
    rows = [
        [
            f"{c.title}: look" if c.flagged else c.title,
            number(c.base),
            number(c.aligned),
            f"{number(c.change.value, 2, True)} ({_range(c.change, 2)})",
        ]
        for c in changes
    ]
    return table(["", "base", "aligned", "change (95 %)"], rows)


def motion(evaluation: Evaluation) -> str:
    """How videos move, base against aligned; nothing for images."""
    if not evaluation.motion:
        return ""
    lead = (
        "What rewards of quality do not see, and alignment can lose. Dynamic degree is the speed of the "
        "fastest 5 % of the pixels; a video is dynamic if a quarter of its frames exceed "
        f"{number(DYNAMIC, 4)} short sides a second, as in VBench. The flow is of matched blocks and not "
        "RAFT's, so these are not VBench's figures. Smoothness is 1 where paths go on as they began, "
        "consistency 1 where frames do not change."
    )
    return section("Motion", lead, _changes(evaluation.motion))


def statistics(evaluation: Evaluation) -> str:
    """Image statistics, base against aligned."""
    lead = (
        "What the pixels say, whatever the rewards say. A reward that rises while these collapse is hacked."
    )
    title = "Image statistics" if not evaluation.motion else "Statistics of the frames"
    return section(title, lead, _changes(evaluation.looks))


def settings(values: Mapping[str, Any], versions: Mapping[str, str], seed: int) -> str:
    """Settings and versions, folded."""
    rows = [["seed", str(seed)], *_flat(values)]
    packages = table(["package", "version"], [[name, number] for name, number in versions.items()], 2)
    return section(
        "Settings and versions",
        "Enough to run it again.",
        f"<details><summary>Settings</summary>{table(['setting', 'value'], rows, 2)}</details>"
        f"<details><summary>Versions</summary>{packages}"
        "</details>\n<footer>Made by diffalign.</footer>",
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    rows: list[list[str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", str(value)])
    return rows
