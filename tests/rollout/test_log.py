"""The hook that logs rounds: what a resumed run says of the rounds before its checkpoint."""

from types import SimpleNamespace

from diffalign.rollout.log import RoundLog
from diffalign.rollout.source import RoundReport
from diffalign.training.metrics import MetricsFile


def run(path, start, rounds, steps_of_a_round=2):
    """Log steps from ``start`` on, of which each round has two; return the hook and its records."""
    source = SimpleNamespace(report=RoundReport())
    log, logged = RoundLog(source, path), []
    state = SimpleNamespace(
        start_step=start, accelerator=SimpleNamespace(num_processes=2), log=logged.append, step=start
    )
    log.on_start(state)
    file = MetricsFile(path, start)
    for step in range(start + 1, rounds * steps_of_a_round + 1):
        number = (step - 1) // steps_of_a_round
        figures = {"rollout/judge": 0.5 + number / 4, "rollout/round": float(number)}
        source.report = RoundReport(number, figures, 8 * (number + 1))
        state.step = step
        log.on_step(state)
        file.write(step, {"loss": 0.0} | (logged.pop() if logged else {}))
    file.close()
    return log


def test_a_resumed_run_has_the_figures_of_an_uninterrupted_one(tmp_path):
    """From within a round, from the end of one, and with nothing left to train."""
    whole = run(tmp_path / "whole.jsonl", 0, 3)
    assert whole.verdict == "mean rewards of the samples, round 0 to 2: judge 0.5 to 1"
    assert whole.images == 48 and whole.figures["first/judge"] == 0.5
    wanted = (tmp_path / "whole.jsonl").read_text()
    for start in (3, 4, 6):
        run(tmp_path / "part.jsonl", 0, 3)
        resumed = run(tmp_path / "part.jsonl", start, 3)
        assert (resumed.verdict, resumed.figures) == (whole.verdict, whole.figures)
        assert resumed.images == 48
        assert (tmp_path / "part.jsonl").read_text() == wanted, "a round is logged once"
