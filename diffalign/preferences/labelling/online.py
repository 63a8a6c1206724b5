"""Human labels for an online run: serve the page of the round that waits for labels."""

from collections.abc import Callable
from pathlib import Path

from diffalign.errors import UserError
from diffalign.preferences.labelling.server import Session, serve
from diffalign.preferences.labelling.store import LOCK, AnswerStore, write_round
from diffalign.preferences.labelling.tasks import read_tasks
from diffalign.utils.lock import locked


def label_round(run: Path, port: int, announce: Callable[[str], None]) -> bool:
    """Serve the newest round of a run until it is fully labelled or interrupted; return whether it is.

    Args:
        run: the run directory.
        port: port of the page, 0 for a free one.
        announce: receives the page's address.

    Raises:
        UserError: the run has no round, another process serves it, or the page cannot be served.
    """
    rounds = sorted((run / "rollouts").glob("round-*"))
    if not rounds:
        raise UserError(f"{run}/rollouts has no round; allowed: a run that waits for labels")
    tasks = read_tasks(str(rounds[-1]), rounds[-1])
    with locked(rounds[-1], LOCK):
        store = AnswerStore(tasks, rounds[-1], write_round)
        session = Session(store, f"{run.name}: {rounds[-1].name}", ends=True)
        if session.done < len(tasks):
            serve(session, "127.0.0.1", port, announce)
        return session.done == len(tasks)
