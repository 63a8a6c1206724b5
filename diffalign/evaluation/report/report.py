"""The files of an evaluation: report.json for programs, report.html for people, and the scores by prompt.

The page is one file without any dependency: images, style and script are inside it, so it can be mailed. It
gives the verdict first, in one sentence with its interval. Of several models it shows one at a time.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.evaluation.contest import CategoryResult, Contest, alone
from diffalign.evaluation.evaluate import Evaluation
from diffalign.evaluation.measuring.image_statistics import StatisticChange
from diffalign.evaluation.measuring.statistics import Comparison
from diffalign.evaluation.report import curves, sections
from diffalign.evaluation.report.distances import distances
from diffalign.evaluation.report.page import contents, page
from diffalign.evaluation.report.people import people_data, people_section, read_people
from diffalign.evaluation.report.side_by_side import pairs
from diffalign.evaluation.report.standings import categories, standings, switch
from diffalign.evaluation.report.tables import write_tables
from diffalign.media.files import MediaLike
from diffalign.utils.files import write_atomic
from diffalign.utils.text import read_json_lines

_PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow")


@dataclass(frozen=True)
class RunFacts:
    """Facts on the evaluated run for the report.

    Attributes:
        method: name of the method ("dpo").
        train_seconds: how long training took; None if not known.
        steps: optimizer steps; None if not known.
        settings: a tree of settings to record (the resolved configuration, sampling settings).
        versions: of packages; see ``package_versions``.
        title: what was aligned, for the page's head.
        usage: instructions to load the result, a line for each program.
    """

    method: str
    train_seconds: float | None = None
    steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    title: str = ""
    usage: Sequence[str] = ()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def report_data(evaluation: Evaluation, facts: RunFacts) -> dict[str, Any]:
    """Return the content of ``report.json`` for one aligned model; see ``contest_data``."""
    return contest_data(alone(evaluation), {"aligned": facts})


def contest_data(contest: Contest, facts: Mapping[str, RunFacts]) -> dict[str, Any]:
    """Return the content of ``report.json``: at the top the best model, under ``models`` every one by name.

    ``prompts`` is the number of distinct prompts, ``p_value_adjusted`` is corrected as ``Contest.adjusted``,
    ``verdict`` is of the best, ``lead`` its gain over the next best. ``motion`` is of videos, ``categories``
    of prompts that have some, ``fid`` and ``lpips_to_base`` where they were measured.
    """
    models = {name: _model_data(contest, name, facts[name]) for name in contest.names}
    best, lead = facts[contest.best], contest.lead
    return {
        **models[contest.best],
        "best": contest.best,
        "verdict": contest.verdict,
        "headline": sections.verdict(contest)[0],
        **({} if lead is None else {"lead": {"over": contest.order[1], **_comparison_data(lead)}}),
        **({"over_runs": _over_runs(contest)} if contest.repeats else {}),
        "models": models,
        "versions": dict(best.versions),
        "seed": contest.leading.seed,
        "settings": dict(best.settings),
    }


def _model_data(contest: Contest, name: str, facts: RunFacts) -> dict[str, Any]:
    evaluation = contest.evaluations[name]
    primary = evaluation.primary.comparison
    results = contest.by_category[name]
    return {
        "method": facts.method,
        "prompts": primary.prompts,
        "base": primary.base,
        "aligned": primary.aligned,
        "gain": primary.gain.value,
        "gain_ci95": primary.gain.interval,
        "win_rate": primary.win_rate.value,
        "win_rate_ci95": primary.win_rate.interval,
        "train_seconds": facts.train_seconds,
        "steps": facts.steps,
        "rewards": {
            result.name: {
                **_comparison_data(result.comparison),
                "p_value_adjusted": contest.adjusted[name][result.name],
            }
            for result in evaluation.rewards
        },
        "image_statistics": {change.name: _change_data(change) for change in evaluation.looks},
        **({"motion": {c.name: _change_data(c) for c in evaluation.motion}} if evaluation.motion else {}),
        **({"categories": _categories_data(results)} if results else {}),
        **_perceptual_data(evaluation),
        "alarm": list(evaluation.alarm),
    }


def _perceptual_data(evaluation: Evaluation) -> dict[str, Any]:
    """``fid`` and ``lpips_to_base``, those that were measured."""
    found: dict[str, Any] = {}
    if evaluation.fid is not None:
        fid = evaluation.fid
        found["fid"] = {**asdict(fid), "change": fid.aligned - fid.base, "caution": fid.caution}
    if evaluation.lpips_to_base is not None:
        distance = evaluation.lpips_to_base
        found["lpips_to_base"] = {"value": distance.value, "ci95": distance.interval}
    return found


def _over_runs(contest: Contest) -> dict[str, Any]:
    """Return the joint results of training runs of one recipe, by reward."""
    return {
        name: {
            "runs": len(found.gains),
            "gain": found.gain.value,
            "gain_ci95": found.gain.interval,
            "win_rate": found.win_rate.value,
            "win_rate_ci95": found.win_rate.interval,
            "gains": list(found.gains),
        }
        for name, found in contest.over_runs.items()
    }


def _categories_data(results: Sequence[CategoryResult]) -> dict[str, Any]:
    """By axis, category and reward."""
    found: dict[str, Any] = {}
    for result in results:
        found.setdefault(result.axis, {})[result.category] = {
            "prompts": next(iter(result.comparisons.values())).prompts,
            "rewards": {name: _comparison_data(c) for name, c in result.comparisons.items()},
        }
    return found


def _change_data(change: StatisticChange) -> dict[str, Any]:
    return {
        "base": change.base,
        "aligned": change.aligned,
        "change": change.change.value,
        "change_ci95": change.change.interval,
        "flagged": change.flagged,
    }


def _comparison_data(comparison: Comparison) -> dict[str, Any]:
    return {
        "base": comparison.base,
        "aligned": comparison.aligned,
        "gain": comparison.gain.value,
        "gain_ci95": comparison.gain.interval,
        "win_rate": comparison.win_rate.value,
        "win_rate_ci95": comparison.win_rate.interval,
        "win": comparison.wins,
        "tie": comparison.ties,
        "loss": comparison.losses,
        "p_value": comparison.p_value,
    }


def write_report(
    folder: Path | str,
    evaluation: Evaluation,
    base_images: Sequence[MediaLike],
    aligned_images: Sequence[MediaLike],
    facts: RunFacts,
    *,
    metrics: Path | str | None = None,
    shown: int | None = None,
) -> Path:
    """Write the report of one aligned model; see ``write_contest``.

    Args:
        folder: where to.
        evaluation: the results.
        base_images: that were evaluated, in the same order.
        aligned_images: that were evaluated, in the same order.
        facts: about the run.
        metrics: the run's metrics.jsonl.
        shown: pairs in each order.

    Raises:
        UserError: counts that differ, or metrics that cannot be read.
    """
    contest = alone(evaluation, base_images, aligned_images)
    known = {} if metrics is None else {"aligned": Path(metrics)}
    return write_contest(folder, contest, {"aligned": facts}, facts.title, metrics=known, shown=shown)


def write_contest(
    folder: Path | str,
    contest: Contest,
    facts: Mapping[str, RunFacts],
    title: str,
    *,
    metrics: Mapping[str, Path] | None = None,
    shown: int | None = None,
) -> Path:
    """Write report.json, report.html, scores.parquet and scores.jsonl into ``folder``, atomically; returns
    the page's path.

    Args:
        folder: where to.
        contest: the results.
        facts: about the run of each model.
        title: what was aligned, for the page's head.
        metrics: metrics.jsonl of the models' runs, where there are any.
        shown: so many of the largest gains, of the largest losses and of random pairs are in the page; None
            is 24 of images and 8 of videos, shared among the models.

    Raises:
        UserError: counts that differ, or metrics that cannot be read.
    """
    count = len(contest.leading.prompts)
    for name, sources in contest.aligned.items():
        if not len(contest.base) == len(sources) == count:
            raise UserError(
                f"{len(contest.base)} base and {len(sources)} {name} images for an evaluation of {count} "
                "pairs: give those that were evaluated"
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: read_json_lines(file) for name, file in (metrics or {}).items()}
    people = read_people(folder)
    data = contest_data(contest, facts) | ({"people": people_data(people)} if people else {})
    write_atomic(folder / "report.json", json.dumps(data, indent=2, default=str) + "\n")
    write_tables(folder, contest)
    target = folder / "report.html"
    write_atomic(target, render(contest, facts, title, rows, shown, people))
    return target


def render(
    contest: Contest,
    facts: Mapping[str, RunFacts],
    title: str = "",
    metrics: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    shown: int | None = None,
    people: Mapping[str, Comparison] | None = None,
) -> str:
    """Return the page as text; see ``write_contest``. ``people`` is what ``read_people`` gave."""
    if shown is None:
        shown = max(4, (8 if contest.leading.motion else 24) // len(contest.names))
    best = facts[contest.best]
    rows = {name: (metrics or {}).get(name, []) for name in contest.names}
    parts = [
        standings(contest),
        switch(contest),
        sections.numbers(contest, {name: (f.train_seconds, f.steps) for name, f in facts.items()}),
        sections.alarm(contest),
        sections.rewards(contest),
        people_section(people or {}),
        sections.motion(contest),
        pairs(contest, shown),
        categories(contest),
        sections.distributions(contest),
        sections.statistics(contest),
        distances(contest),
        curves.training(rows),
        curves.held_out(rows),
        sections.usage(best.usage),
        sections.settings(best.settings, best.versions, contest.leading.seed),
    ]
    head = sections.head(contest, title or f"{best.method}: base against aligned")
    return page(f"{sections.verdict(contest)[0]} {title}".strip(), "\n".join([head, contents(parts), *parts]))
