"""Where a training step's time goes: reference, policy forward, backward, optimizer, data, all else.

    python -m benchmarks.profile                   # the tiny SDXL and a middle-sized one, LoRA-DPO
    python -m benchmarks.profile --model mid --bank 4 --steps 24

Seconds are processor time of the main thread, in which torch's CPU backward runs, too: other processes on the
machine do not count. Threads that read ahead do not count either; what the step waits for them does. With
``--bank`` the same run is measured without and with ``data.reference_bank``, in one
process one after the other, once nearly every draw has been asked about.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffalign.config.schema import Run
from diffalign.data import read_preferences
from diffalign.methods import build
from diffalign.models.loading import load
from diffalign.runs.setup import Setup, offline
from diffalign.runs.validate import read_run
from diffalign.training.acceleration import Accelerator, accelerator_for
from diffalign.training.loop import train
from diffalign.training.state import TrainState
from diffalign.types import Batch, Denoiser

NETWORK = ("policy forward", "reference forward", "backward")
WARM = 3
"""Steps that are not counted: the first ones allocate."""


@dataclass
class Clock:
    """Processor seconds of the main thread by part; ``total`` is that of whole steps, in ``steps``."""

    parts: Counter[str]
    total: float = 0.0
    steps: int = 0
    counting: bool = False
    interrupted: bool = False

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time counts to ``part``."""

        def call(*arguments: Any, **named: Any) -> Any:
            begun = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                if self.counting:
                    self.parts[part] += time.thread_time() - begun

        return call

    @property
    def outside(self) -> float:
        """Share of a step outside the network and the optimizer's arithmetic."""
        inside = sum(self.parts[part] for part in (*NETWORK, "optimizer"))
        return 1 - inside / self.total


class _Timed:
    """A denoiser whose calls are timed."""

    def __init__(self, denoiser: Denoiser, clock: Clock, part: str):
        self._denoiser, self.path, self.target = denoiser, denoiser.path, denoiser.target
        self._call = clock.timed(part, denoiser)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        out: torch.Tensor = self._call(x_t, t, cond)
        return out


class _Source:
    """A source whose batches are timed."""

    def __init__(self, source: Any, clock: Clock):
        self._source, self._clock = source, clock

    def seek(self, micro_step: int) -> None:
        self._source.seek(micro_step)

    def __iter__(self) -> Iterator[Batch[Any]]:
        following = self._clock.timed("data", iter(self._source).__next__)
        while True:
            yield following()


class _Watch:
    """The hook that starts the clock after the warm-up, and times the optimizer."""

    def __init__(self, clock: Clock, warm: int):
        self._clock, self._warm, self._since = clock, warm, 0.0

    def on_start(self, state: TrainState) -> None:
        state.optimizer.step = self._clock.timed("optimizer", state.optimizer.step)  # type: ignore[method-assign]

    def on_step(self, state: TrainState) -> None:
        now = time.thread_time()
        if self._clock.counting:
            self._clock.total += now - self._since
            self._clock.steps += 1
        self._clock.counting, self._since = state.step >= self._warm, time.thread_time()

    def on_end(self, state: TrainState) -> None:
        """Nothing to finish."""


def middle(folder: Path) -> Path:
    """Write a UNet of SDXL's kind with random weights, 8 times as wide as the tiny one."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = dict(load(read_run("tiny_sdxl_dpo").model).network.config)
    config |= {"block_out_channels": (256, 512), "attention_head_dim": (4, 8), "norm_num_groups": 32}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder / "unet"


def run_of(name: str, folder: Path, steps: int, bank: int = 0) -> Run:
    """Return a LoRA-DPO run of the tiny or the middle-sized model on drawn pairs."""
    run = read_run("tiny_sdxl_dpo")
    lora = replace(run.model.lora, rank=8, targets=("to_q", "to_k", "to_v", "to_out.0"))
    network = str(middle(folder)) if name == "mid" else None
    return replace(
        run,
        output=str(folder / "run"),
        model=replace(run.model, lora=lora, network=network),
        data=replace(
            run.data, limit=8, holdout=0.0, resolution=64 if name == "mid" else 32, reference_bank=bank
        ),
        training=replace(run.training, steps=steps, batch_size=4),
    )


def prepared(run: Run, accelerator: Accelerator) -> tuple[Any, Setup]:
    """Return a run's method and what it trains on."""
    model, method = load(run.model), build(run.method)
    preferences = read_preferences(run.data, run.training.seed)
    quiet = lambda line: None  # noqa: E731
    setup = offline(run, model, method, method, preferences=preferences, accelerator=accelerator, tell=quiet)
    return method, setup


def profile(run: Run, warm: int = WARM) -> Clock:
    """Train and return where the time of the steps after the first ``warm`` went."""
    accelerator = accelerator_for(run.training)
    method, setup = prepared(run, accelerator)
    clock, roles = Clock(Counter()), setup.roles
    accelerator.backward = clock.timed("backward", accelerator.backward)  # type: ignore[method-assign]
    state = train(
        method=method,
        denoiser_of=lambda network: _Timed(roles.policy_of(network), clock, "policy forward"),
        reference=_Timed(roles.reference, clock, "reference forward"),
        network=roles.network,
        parameters=roles.parameters,
        source=_Source(setup.source, clock),
        settings=run.training,
        optimizer=run.optimizer,
        accelerator=accelerator,
        hooks=[_Watch(clock, warm)],
    )
    clock.interrupted = state.interrupted
    return clock


def row(name: str, clock: Clock) -> dict[str, Any]:
    """Return milliseconds a step and the share of each part."""
    parts = {part: clock.parts[part] / clock.total for part in (*NETWORK, "optimizer", "data")}
    parts["other"] = 1 - sum(parts.values())
    shares = {f"{part} %": round(100 * share, 2) for part, share in parts.items()}
    return {
        "model": name,
        "steps": clock.steps,
        "ms a step": round(1000 * clock.total / clock.steps, 1),
    } | shares


def main() -> None:
    """Measure and print one line of JSON for each model and bank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "mid", "both"), default="both")
    parser.add_argument("--steps", type=int, default=20, help="counted steps")
    parser.add_argument("--bank", type=int, default=0, help="also with data.reference_bank of so many draws")
    arguments = parser.parse_args()
    for name in ("tiny", "mid") if arguments.model == "both" else (arguments.model,):
        for bank in dict.fromkeys((0, arguments.bank)):
            with tempfile.TemporaryDirectory() as folder:
                # 8 pairs, 4 a step: after 8 times the bank hardly a draw is new
                warm = WARM if not bank else 16 * bank
                run = run_of(name, Path(folder), warm + arguments.steps, bank)
                clock = profile(run, warm)
            if clock.steps:
                print(json.dumps(row(name, clock) | {"bank": bank}), flush=True)
            if clock.interrupted:
                raise SystemExit(f"interrupted after {clock.steps} counted steps of {name}")


if __name__ == "__main__":
    main()
