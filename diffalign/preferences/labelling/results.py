"""Inputs and results of labelling: blind comparisons of evaluations, order by disagreement, the summary."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from diffalign.errors import UserError, unknown
from diffalign.evaluation.contest import BASE
from diffalign.evaluation.report.people import read_people
from diffalign.media.files import open_media
from diffalign.preferences.labelling.server import Session
from diffalign.preferences.labelling.store import LABELS
from diffalign.preferences.labelling.tasks import Task, blind_tasks
from diffalign.rewards import load


def is_evaluation(folder: Path) -> bool:
    """Return whether a folder is an output of ``diffalign evaluate``."""
    return (folder / "images" / BASE).is_dir() and (folder / "report.json").is_file()


def evaluation_tasks(folder: Path, aligned: str | None, limit: int | None) -> list[Task]:
    """Return the blind comparisons of an evaluation, one or more: the base against one aligned model.

    Args:
        folder: the evaluation's folder.
        aligned: name of the aligned model's folder under ``images``; None: the only one.
        limit: largest number of comparisons; None: all.

    Raises:
        UserError: no such model, or several models and ``aligned`` is None.
    """
    models = sorted(f.name for f in (folder / "images").iterdir() if f.is_dir() and f.name != BASE)
    if aligned is None and len(models) != 1:
        raise UserError(
            f"{folder} has {len(models)} aligned models; name one by --aligned: {', '.join(models)}"
        )
    name = models[0] if aligned is None else aligned
    if name not in models:
        raise unknown("--aligned", name, models)
    return blind_tasks({BASE: folder / "images" / BASE, name: folder / "images" / name}, limit)


def disagreement_of(specs: Sequence[str], device: str) -> Callable[[Task], float]:
    """Return a measure of the rewards' disagreement on a task.

    It is 0 if all rewards prefer one image, and 1 if their votes are spread evenly.
    """
    rewards = [load(spec, device) for spec in specs]

    def disagreement(task: Task) -> float:
        media = [open_media(file) for file in task.media]
        best = [int(reward(media, [task.prompt] * len(media)).argmax()) for reward in rewards]
        most = max(best.count(place) for place in best) / len(best)
        return (1 - most) / (1 - 1 / min(len(media), len(best)))

    return disagreement


def summary(session: Session, output: Path, of_round: bool, evaluation: Path | None = None) -> str:
    """Return the summary of a session: counts, agreement, and the next command.

    Args:
        session: the session.
        output: folder of the answers.
        of_round: whether the tasks are a round of an online run.
        evaluation: folder of the evaluation whose models the tasks compare blind; None: they compare none.
    """
    store = session.store
    lines = [f"{session.done} of {len(store.tasks)} compared, by {len(store.counts())} people"]
    if agreement := store.agreement():
        lines.append(
            f"two people agree on {agreement.value:.1%}, 95 % interval {agreement.low:.1%} to "
            f"{agreement.high:.1%}"
        )
    if evaluation:
        for name, result in read_people(evaluation).items():
            rate = result.win_rate
            lines.append(
                f"{name} wins {rate.value:.1%} against the base, 95 % interval {rate.low:.1%} to "
                f"{rate.high:.1%}: {result.outcome}"
            )
        lines.append("the same `diffalign evaluate` command again puts it into the report")
    elif of_round:
        lines.append("continue the run with --resume latest")
    else:
        lines.append(f"train on it: diffalign train RECIPE --data.path {shlex.quote(str(output / LABELS))}")
    return "\n".join(lines)
