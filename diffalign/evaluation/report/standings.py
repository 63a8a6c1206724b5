"""The report's comparison of several models, the control that selects one, and the gains by category."""

from html import escape

from diffalign.evaluation.contest import CategoryResult, Contest
from diffalign.evaluation.evaluate import MIN_PROMPTS
from diffalign.evaluation.report.charts import interval_bar
from diffalign.evaluation.report.numbers import gained, p_value, percent, span
from diffalign.evaluation.report.page import section, stack


def standings(contest: Contest) -> str:
    """Return the models by the primary reward, the best first; empty for one model."""
    if len(contest.names) == 1:
        return ""
    primary = contest.leading.primary.name
    gains = [e.primary.comparison.gain for e in contest.evaluations.values()]
    reach = max(max(abs(g.low), abs(g.high)) for g in gains) * 1.1 or 1.0
    rows = []
    for place, name in enumerate(contest.order, 1):
        evaluation = contest.evaluations[name]
        c = evaluation.primary.comparison
        bar = interval_bar(f"gain {gained(c.gain)}, {span(c.gain)}", c.gain, -reach, reach, 0.0)
        warning = ' <span class="flag">warning</span>' if evaluation.alarm else ""
        corrected = p_value(contest.adjusted[name][primary])
        rows.append(
            f'<div class="standing"><h3>{place}. {escape(name)}{warning}</h3>'
            f'<div class="bar">{bar}</div>'
            f"<p><b>{gained(c.gain)}</b> ({span(c.gain)}), wins "
            f"<b>{percent(c.win_rate.value)}</b>, corrected {corrected}</p></div>"
        )
    lead = f"Gains over the base by {primary}, with 95 % intervals, on one scale. Corrected p-values (Holm) "
    lead += "allow for the number of models."
    return section("Models", lead, f'<div class="card standings">{"".join(rows)}</div>')


def switch(contest: Contest) -> str:
    """Return the control that selects the model of the page; empty for one model."""
    if len(contest.names) == 1:
        return ""
    buttons = "".join(
        f'<button type="button" data-choose="{escape(name, quote=True)}" '
        f'aria-pressed="{str(name == contest.best).lower()}">{escape(name)}</button>'
        for name in contest.order
    )
    return f'<nav class="switch" aria-label="Model"><div class="buttons">{buttons}</div></nav>'


def categories(contest: Contest) -> str:
    """Return the gains of the primary reward by category, the others below; empty without categories."""
    if not contest.categories:
        return ""
    primary = contest.leading.primary.name
    bodies = {
        name: '<div class="axes">'
        + "".join(_axis(axis, [r for r in results if r.axis == axis], primary) for axis in contest.categories)
        + "</div>"
        for name, results in contest.by_category.items()
    }
    lead = f"Gains of {primary} on the prompts of one category, with 95 % intervals that are not corrected "
    lead += "for how many there are: one in twenty excludes zero by chance. Grey: too few prompts to tell."
    return section("By category", lead, stack(bodies))


def _axis(axis: str, results: list[CategoryResult], primary: str) -> str:
    found = sorted(results, key=lambda r: -r.comparisons[primary].gain.value)
    enough = [r.comparisons[primary].gain for r in found if r.comparisons[primary].prompts >= MIN_PROMPTS]
    reach = max((max(abs(g.low), abs(g.high)) for g in enough), default=1.0) * 1.1 or 1.0
    rows = []
    for result in found:
        c = result.comparisons[primary]
        few = c.prompts < MIN_PROMPTS
        bar = interval_bar(f"gain {gained(c.gain)}, {span(c.gain)}", c.gain, -reach, reach, 0.0)
        others = ", ".join(
            f"{escape(name)} {gained(other.gain)}"
            for name, other in result.comparisons.items()
            if name != primary
        )
        counted = f"{c.prompts} prompt{'s' if c.prompts > 1 else ''}"
        more = f"<br><small>{others}</small>" if others else ""
        rows.append(
            f'<div class="standing{" few" if few else ""}"><h3>{escape(result.category)} '
            f'<small>{counted}</small></h3><div class="bar">{bar}</div>'
            f"<p><b>{gained(c.gain)}</b> ({span(c.gain)}), wins "
            f"{percent(c.win_rate.value)}{more}</p></div>"
        )
    return f'<div class="card standings"><h3 class="axis">{escape(axis)}</h3>{"".join(rows)}</div>'
