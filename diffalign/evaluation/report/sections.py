"""The sections of the report, each a function from results to HTML. External text is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from diffalign.evaluation.contest import Contest
from diffalign.evaluation.evaluate import MIN_PROMPTS, Evaluation, RewardResult
from diffalign.evaluation.measuring.image_statistics import StatisticChange
from diffalign.evaluation.measuring.motion import DYNAMIC
from diffalign.evaluation.report.charts import histogram, interval_bar, number, outcome_bar
from diffalign.evaluation.report.numbers import (
    decimals,
    duration,
    fixed,
    gained,
    p_value,
    percent,
    plain_p,
    span,
)
from diffalign.evaluation.report.page import LEGEND, section, stack, table


def verdict(contest: Contest) -> tuple[str, str]:
    """Return the verdict as a headline and the sentences that support it, as plain text."""
    if contest.repeats:
        return _of_runs(contest)
    evaluation, several = contest.leading, len(contest.names) > 1
    name, comparison = evaluation.primary.name, evaluation.primary.comparison
    on = f"{comparison.prompts} prompt{'s' * (comparison.prompts != 1)}"
    if len(evaluation.prompts) != comparison.prompts:
        on += f" ({len(evaluation.prompts)} pairs of {evaluation.kind})"
    change = f"{gained(comparison.gain)} (95 % interval {span(comparison.gain)})"
    headline = (_of_several(contest) if several else _OF_ONE)[contest.verdict]
    who = f"{contest.best}'s mean score" if several else "the mean score"
    support = f"By {name}, {who} changes by {change} on {on}, drawn by {'all' if several else 'both'} models "
    support += f"from the same noise ({plain_p(comparison.p_value)})."
    if contest.lead is not None:
        ahead = f"{gained(contest.lead.gain)} ({span(contest.lead.gain)}, {plain_p(contest.lead.p_value)})"
        support += f" It is {ahead} ahead of {contest.order[1]}, the next."
    if comparison.untied < comparison.prompts:
        support += f" The gain is 0 on {comparison.prompts - comparison.untied} of the prompts."
    if contest.verdict == "no difference shown":
        support += _unsure(contest)
    if contest.verdict == "too few prompts":
        support += f" An interval needs at least {MIN_PROMPTS} prompts; a hundred and more tell something."
    if evaluation.alarm:
        support += " Read the warning below before you trust it."
    return headline, support


def _of_runs(contest: Contest) -> tuple[str, str]:
    """Return headline and supporting sentences for training runs with several seeds."""
    evaluation, runs = contest.leading, len(contest.names)
    primary, found = evaluation.primary, contest.over_runs[evaluation.primary.name]
    few = primary.comparison.prompts < MIN_PROMPTS
    gain = found.gain
    headline = (
        _OF_ONE["too few prompts"] if few
        else f"Over {runs} training runs the aligned model is better." if gain.low > 0
        else f"Over {runs} training runs the aligned model is worse." if gain.high < 0
        else f"Over {runs} training runs no difference is shown."
    )  # fmt: skip
    support = f"By {primary.name}, the mean score changes by {gained(gain)} (95 % interval {span(gain)} over "
    support += f"runs and prompts) on {primary.comparison.prompts} prompts; the runs' own gains are "
    support += f"{', '.join(fixed(value, decimals(gain), True) for value in found.gains)}."
    if runs < MIN_RUNS:
        support += f" An interval over fewer than {MIN_RUNS} runs is too narrow."
    if any(e.alarm for e in contest.evaluations.values()):
        support += " Read the warnings below before you trust it."
    return headline, support


MIN_RUNS = 5  # with two the two-level bootstrap's 95 % interval covers 0.82 to 0.95, with one 0.49 to 0.86
_OF_ONE = {
    "better": "The aligned model is better.",
    "worse": "The aligned model is worse.",
    "no difference shown": "No difference shown.",
    "too few prompts": "Too few prompts to tell.",
}


def _of_several(contest: Contest) -> dict[str, str]:
    """Return the headline about the best of several models."""
    count = len(contest.names)
    best = f"{contest.best} is the best of {count}, and better than the base."
    if not contest.leads:
        best = f"{contest.best} is better than the base; it is not shown to be ahead of {contest.order[1]}."
    return {
        "better": best,
        "worse": f"None of the {count} aligned models is better than the base.",
        "no difference shown": f"None of the {count} aligned models is shown to be better than the base.",
        "too few prompts": "Too few prompts to tell.",
    }


def _unsure(contest: Contest) -> str:
    """Return the reason why no difference is shown."""
    comparison = contest.leading.primary.comparison
    if comparison.outcome == "better":
        return (
            f" The best of {len(contest.names)} is ahead by chance more often than one is; corrected for "
            "that, it is not shown."
        )
    if comparison.gain.low > 0 or comparison.gain.high < 0:
        return (
            f" Only {comparison.untied} prompts differ, so the interval is too narrow and the test does not "
            "show it."
            if comparison.untied < comparison.prompts
            else " The interval excludes zero, but the test does not show it."
        ) + " More prompts would be needed to tell."
    return " The interval includes zero: more prompts, or more training, would be needed to tell."


def head(contest: Contest, title: str) -> str:
    """Title, verdict and its support."""
    headline, support = verdict(contest)
    eyebrow = f'<p class="eyebrow">{escape(title)}</p>\n' if title else ""
    return f'<header>\n{eyebrow}<h1>{escape(headline)}</h1>\n<p class="lead">{escape(support)}</p>\n</header>'


def _number(what: str, value: str, more: str, kind: str = "") -> str:
    return (
        f'<div class="card number"><div class="what">{escape(what)}</div>'
        f'<div class="value {kind}">{_breakable(value)}</div><div class="more">{escape(more)}</div></div>'
    )


def _breakable(value: str) -> str:
    """Return a value as HTML that a narrow tile breaks after the arrow, and nowhere else."""
    first, arrow, second = value.partition(" → ")
    parts = [f"{first} →", second] if arrow else [value]
    return " ".join(f"<span>{escape(part)}</span>" for part in parts)


def numbers(contest: Contest, training: Mapping[str, tuple[float | None, int | None]]) -> str:
    """Return the big numbers of the primary reward; ``training`` has seconds and steps by model."""
    return stack({name: _numbers(e, *training[name]) for name, e in contest.evaluations.items()})


def _numbers(evaluation: Evaluation, train_seconds: float | None, steps: int | None) -> str:
    name, comparison = evaluation.primary.name, evaluation.primary.comparison
    kind = {"better": "good", "worse": "bad"}.get(evaluation.verdict, "")
    places = decimals(comparison.gain)
    cards = [
        _number(
            f"mean {name}",
            f"{fixed(comparison.base, places)} → {fixed(comparison.aligned, places)}",
            "base → aligned",
        ),
        _number("gain", gained(comparison.gain), f"95 %: {span(comparison.gain)}", kind),
        _number(
            "win rate",
            percent(comparison.win_rate.value),
            f"95 %: {percent(comparison.win_rate.low)} to {percent(comparison.win_rate.high)}",
        ),
    ]
    for change in evaluation.motion[:1]:
        own = decimals(change.change)
        values = f"{fixed(change.base, own)} → {fixed(change.aligned, own)}"
        cards.append(_number("dynamic degree", values, f"change, 95 %: {span(change.change)}"))
    if train_seconds is not None:
        cards.append(
            _number("training", duration(train_seconds), f"{steps} steps" if steps is not None else "")
        )
    return f'<div class="numbers">{"".join(cards)}</div>'


def alarm(contest: Contest) -> str:
    """Return the warnings, if there are any."""
    if not any(e.alarm for e in contest.evaluations.values()):
        return ""
    return stack({name: _alarm(e) for name, e in contest.evaluations.items()})


def _alarm(evaluation: Evaluation) -> str:
    if not evaluation.alarm:
        return '<p class="soft">No sign of over-optimisation here.</p>'
    items = "".join(f"<li>{escape(text)}</li>" for text in evaluation.alarm)
    return (
        f'<div class="alarm" role="alert"><strong>Possible over-optimisation</strong><ul>{items}</ul></div>'
    )


def rewards(contest: Contest) -> str:
    """Every reward: gain and win rate with intervals, wins, ties and losses."""
    bodies = {
        name: "\n".join(_reward(result, contest.adjusted[name][result.name]) for result in e.rewards)
        for name, e in contest.evaluations.items()
    }
    lead = "Differences on the same prompts and noise, with 95 % intervals from resampling whole prompts. "
    lead += "Ties count half; the dashed mark is no difference. "
    lead += "A bar of gains is in the units of its reward, so compare numbers, not lengths. "
    lead += "The first reward gives the verdict. "
    several = len(bodies) > 1
    lead += "Corrected p-values (Holm) allow for the number of "
    lead += "models, those of the other rewards for theirs as well." if several else "other rewards."
    return section("By reward", lead, stack(bodies))


def _reward(result: RewardResult, adjusted: float) -> str:
    c = result.comparison
    reach = max(abs(c.gain.low), abs(c.gain.high)) * 1.15 or 1.0  # where nothing changed, a unit
    places = decimals(c.gain)
    gain = interval_bar(f"gain {gained(c.gain)}, {span(c.gain)}", c.gain, -reach, reach, 0.0)
    rate = interval_bar(f"win rate {percent(c.win_rate.value)}", c.win_rate, 0.0, 1.0, 0.5, percent=True)
    parts = outcome_bar(f"{c.wins} wins, {c.ties} ties, {c.losses} losses", c.wins, c.ties, c.losses)
    return (
        f'<div class="card reward"><div><h3>{escape(result.name)}</h3>'
        f"<p>{fixed(c.base, places)} → {fixed(c.aligned, places)}</p></div>"
        f"<div><p>gain <b>{gained(c.gain)}</b> ({span(c.gain)})</p><div "
        f'class="bar">{gain}</div>'
        f"<p>{p_value(c.p_value)}, corrected {p_value(adjusted)}</p></div>"
        f"<div><p>wins <b>{percent(c.win_rate.value)}</b> ({percent(c.win_rate.low)} to "
        f'{percent(c.win_rate.high)})</p><div class="bar">{rate}</div><div class="bar">{parts}</div>'
        f"<p>{c.wins} wins, {c.ties} ties, {c.losses} losses</p></div></div>"
    )


def distributions(contest: Contest) -> str:
    """Return a histogram of every reward's scores."""
    bodies = {
        name: '<div class="charts">'
        + "".join(
            f'<div class="card"><h3>{escape(r.name)}</h3>'
            f"{histogram(f'scores of {r.name}', r.base_scores, r.aligned_scores)}{LEGEND}</div>"
            for r in e.rewards
        )
        + "</div>"
        for name, e in contest.evaluations.items()
    }
    lead = f"How the scores of single {contest.leading.kind} are spread; dotted lines are the means."
    return section("Scores", lead, stack(bodies))


def _changes(changes: Sequence[StatisticChange]) -> str:
    rows = [
        [
            f"{c.title}: look" if c.flagged else c.title,
            fixed(c.base, decimals(c.change)),
            fixed(c.aligned, decimals(c.change)),
            f"{gained(c.change)} ({span(c.change)})",
        ]
        for c in changes
    ]
    return table(["", "base", "aligned", "change (95 %)"], rows)


def motion(contest: Contest) -> str:
    """Return the section on motion of base and aligned videos; empty for images."""
    if not contest.leading.motion:
        return ""
    lead = (
        "What rewards of quality do not see, and alignment can lose. Dynamic degree is the speed of the "
        "fastest 5 % of the pixels; a video is dynamic if a quarter of its frames exceed "
        f"{number(DYNAMIC, 4)} short sides a second, as in VBench. The flow is of matched blocks and not "
        "RAFT's, so these are not VBench's figures. Smoothness is 1 where paths go on as they began, "
        "consistency 1 where frames do not change."
    )
    return section("Motion", lead, stack({n: _changes(e.motion) for n, e in contest.evaluations.items()}))


def statistics(contest: Contest) -> str:
    """Return the section on image statistics of base and aligned samples."""
    lead = (
        "What the pixels say, whatever the rewards say. A reward that rises while these collapse is hacked."
    )
    title = "Image statistics" if not contest.leading.motion else "Statistics of the frames"
    return section(title, lead, stack({n: _changes(e.looks) for n, e in contest.evaluations.items()}))


def usage(lines: Sequence[str]) -> str:
    """Return how each program loads the result, a line each; empty without lines."""
    if not lines:
        return ""
    text = escape("\n".join(lines))
    return section("Use it", "How each program loads the result.", f"<pre>{text}</pre>")


def settings(values: Mapping[str, Any], versions: Mapping[str, str], seed: int) -> str:
    """Return settings and versions, folded."""
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
