"""``diffalign train``: align a model with preferences."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from diffalign.cli import INTERRUPTED
from diffalign.cli.common import count, share
from diffalign.cli.flags import read_flags, resolve

if TYPE_CHECKING:
    from diffalign.config.schema import Run
    from diffalign.runs.align import Result


def run(argv: Sequence[str]) -> int:
    """Train, and print where the results are."""
    if {"-h", "--help"} & set(argv):
        from diffalign.cli.help import train_help

        print(train_help(), end="")
        return 0
    flags = read_flags(argv, own_switches=("print-config",))
    if not argv:
        from diffalign.config.files import alike, shipped_configs
        from diffalign.errors import UserError

        raise UserError(
            "train needs a config or flags, such as `diffalign train sdxl_dpo_lora_24gb --data.path "
            f"pairs.parquet`; {alike('', shipped_configs())}"
        )
    run, notes = resolve(flags, needs=() if flags.switches else ("model.path", "data.path"))
    for note in notes:
        _say([f"note: {note}"])
    if flags.switches:
        from diffalign.config.io import to_yaml

        print(to_yaml(run), end="")
        return 0
    from diffalign.runs.align import align

    result = align(run)
    while result.waiting and run.rollout.page and _label(run, result):
        run = replace(run, resume="latest")
        result = align(run)
    if result.waiting:
        _say(waiting(run, result))
        return 0
    _say(interrupted(run, result) if result.interrupted else finished(run, result))
    return INTERRUPTED if result.interrupted else 0


def _label(run: "Run", result: "Result") -> bool:
    """Serve the labelling page of the current round; return whether all of it is labelled."""
    from diffalign.preferences.labelling.online import label_round

    _say([f"after step {result.steps}: {result.waiting.partition(':')[0]}; label them at:"])
    return label_round(result.output, run.rollout.page_port, lambda address: print(address, flush=True))


def finished(run: "Run", result: "Result") -> list[str]:
    """Return the lines to print after a run."""
    minutes = f"{result.seconds / 60:.1f} min" if result.seconds >= 90 else f"{result.seconds:.0f} s"
    memory = f", at most {result.memory.text}" if result.memory.bytes else ""
    lines = [
        f"done: {count(result.steps, 'step')}, {minutes} of training{memory}; " + result.counts,
        result.verdict if run.rollout.prompts else f"held-out pairs: {result.verdict}",
        "",
        f"  {result.aligned}/  what diffusers loads, with a model card",
        f"  {result.output}/config.yaml  this run; metrics.jsonl, tensorboard/, checkpoints/ beside it",
        "",
        "load it in diffusers:",
        *(f"    {line}" for line in result.loading),
        "",
        "measure the gain:",
    ]
    return [*lines, f"    diffalign evaluate --run {shlex.quote(str(result.output))} {_measured(run)}"]


def _measured(run: "Run") -> str:
    """Return the arguments of ``diffalign evaluate`` that name prompts and rewards fit for a run's model."""
    from diffalign.tiny.worlds import MEASURES

    if not run.model.path.startswith("tiny:"):
        return f"--prompts prompts.txt --rewards {'video_reward' if run.data.frames else 'pickscore'}"
    own = MEASURES[run.model.path.removeprefix("tiny:")]
    return (
        f"--prompts tiny:{own.captions}test --limit {own.few} --steps 20 --guidance 1 "
        f"--rewards {','.join(own.rewards)}"
    )


def waiting(run: "Run", result: "Result") -> list[str]:
    """Return the lines to print when a round waits for labels."""
    return [
        f"after step {result.steps}: {result.waiting}",
        f"    diffalign train {shlex.quote(f'{result.output}/config.yaml')} --resume latest",
    ]


def interrupted(run: "Run", result: "Result") -> list[str]:
    """Return the lines to print after Ctrl-C."""
    return [
        f"interrupted after step {result.steps}; a checkpoint is in {result.output}/checkpoints",
        "continue exactly where it stopped:",
        f"    diffalign train {shlex.quote(f'{result.output}/config.yaml')} --resume latest",
    ]


def _say(lines: Sequence[str]) -> None:
    if share()[0] == 0:
        print("\n".join(lines), file=sys.stderr)
