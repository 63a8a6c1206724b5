"""How often a training step waits for the device, counted on a device that is none.

    python -m benchmarks.host_syncs                     # all cases: the waits of a step that logs nothing
    python -m benchmarks.host_syncs --cases lora,full

``benchmarks.fake_device`` says what a wait is, and which are not seen. Models are tiny: the number of waits
does not depend on the size. The second of three steps is told by place; the first fills what is new in a run
(moments, a bank, a round of samples), and the last one logs.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.fake_device import DEVICE, FakeDevice, Wait, fake_device
from diffalign.data import read_preferences
from diffalign.methods import build
from diffalign.models.dropout import switch_off_dropout
from diffalign.models.loading import load
from diffalign.runs.online_checks import check_online
from diffalign.runs.resume import resolved
from diffalign.runs.setup import offline, online
from diffalign.runs.validate import read_run
from diffalign.strategies import wrap
from diffalign.training.acceleration import accelerator_for
from diffalign.training.hooks import Logging
from diffalign.training.loop import train
from diffalign.training.state import TrainState

_PAIRS = ("--data.limit=8", "--data.holdout=0")
_ROUNDS = ("--checkpoint.every=7207200", "--validation.every=0")  # a multiple of the steps of any round
_SMALL = "--training.batch_size=2"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "lora": ("tiny_sdxl_dpo", _PAIRS),
    "full": ("tiny_sd3_dpo", (*_PAIRS, "--model.train=full", "--training.ema_decay=0.9")),
    "bank": ("tiny_sd15_dpo", (*_PAIRS, "--data.reference_bank=1")),
    "video": ("tiny_wan_dpo", _PAIRS),
    "kto": ("tiny_sdxl_kto", _PAIRS),
    "rankdpo": ("tiny_sdxl_rankdpo", _PAIRS),
    "online_dpo": ("tiny_sdxl_online_dpo", _ROUNDS),
    "ddpo": ("tiny_sdxl_ddpo", _ROUNDS),
    "draft": ("tiny_sdxl_draft", (*_ROUNDS, _SMALL, "--rollout.steps=4")),
    "flow_grpo": ("tiny_sd3_flow_grpo", (*_ROUNDS, _SMALL, "--rollout.prompts_per_round=2")),
}
"""Recipe and flags by name: LoRA and all weights, noise schedules and flows, pairs, lists and rollouts."""


class _Steps:
    """The hook that gives each optimizer step its waits, those of the hooks before it included."""

    def __init__(self, device: FakeDevice):
        self._device = device
        self.steps: list[list[Wait]] = []

    def on_start(self, state: TrainState) -> None:
        self._device.waits.clear()

    def on_step(self, state: TrainState) -> None:
        self.steps.append([*self._device.waits])
        self._device.waits.clear()

    def on_end(self, state: TrainState) -> None:
        """Nothing to finish."""


def waits_of(recipe: str, flags: Sequence[str], folder: Path, steps: int = 3) -> list[list[Wait]]:
    """Train a tiny recipe on the fake device; return the waits of each step, the last of which logs."""
    given = (f"--output={folder / 'run'}", f"--training.steps={steps}", f"--logging.every={steps}")
    run = read_run(recipe, [*given, *flags])
    inner = build(run.method)
    run = resolved(run, inner)
    method = wrap(inner, run.strategies)
    prompts = check_online(run)
    accelerator, model = accelerator_for(run.training), load(run.model)
    switch_off_dropout(model.network)
    quiet = lambda line: None  # noqa: E731
    preferences = None if prompts else read_preferences(run.data, run.training.seed)
    with fake_device(accelerator) as device:
        if preferences is None:
            model.network.to(DEVICE)
            setup = online(run, model, method, accelerator, fresh=True, tell=quiet, prompts=prompts)
        else:
            setup = offline(
                run, model, inner, method, preferences=preferences, accelerator=accelerator, tell=quiet
            )
        counting, roles = _Steps(device), setup.roles
        hooks = [*setup.hooks, *roles.hooks, Logging(folder / "run", run.logging), counting]
        train(
            method=method, denoiser_of=roles.policy_of, reference=roles.reference, network=roles.network,
            parameters=roles.parameters, source=setup.source, settings=run.training, optimizer=run.optimizer,
            accelerator=accelerator, hooks=hooks, kept=roles.kept,
        )  # fmt: skip
        setup.close()
    return counting.steps


def row(case: str, steps: Sequence[Sequence[Wait]]) -> dict[str, object]:
    """Return the waits of the second step by place, and their numbers in all steps."""
    places = Counter(f"{wait.operation} at {wait.place}" for wait in steps[1])
    return {
        "case": case,
        "recipe": CASES[case][0],
        "steps": [len(waits) for waits in steps],
        "second": places,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Count and print one line of JSON for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", help=f"of {', '.join(CASES)}; default: all")
    arguments = parser.parse_args(argv)
    for case in record.chosen(arguments.cases, list(CASES)):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(row(case, waits_of(*CASES[case], Path(folder)))), flush=True)


if __name__ == "__main__":
    main()
