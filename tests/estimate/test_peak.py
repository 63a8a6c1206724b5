"""What a run is estimated to take, against the tensors that are alive at the peak of its training."""

import gc
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import Alive
from diffalign.estimate.estimate import estimate
from diffalign.runs import align as runs
from diffalign.runs.micro_batch import workload_of
from diffalign.runs.validate import read_run
from diffalign.training import loop

pytestmark = pytest.mark.slow

WHOLE = ("--model.dtype=float32",)
INT8 = ("--model.quantize=torchao_int8", "--model.dtype=bfloat16", "--training.mixed_precision=bf16")
CHECKPOINTING = ("--model.gradient_checkpointing=true",)


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [(WHOLE, 0.05), (INT8, 0.15), (CHECKPOINTING, 0.15)],
    ids=["whole", "int8", "blocks"],
)
@pytest.mark.parametrize("recipe", ["tiny_sdxl_dpo", "tiny_sd15_dpo", "tiny_sd3_dpo"])
def test_a_run_takes_what_is_estimated(
    recipe: str, flags: tuple[str, ...], tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights, adapters, gradients, optimizer and activations; of two optimizer steps."""
    usual = ("--training.steps=2", "--data.limit=80", "--data.holdout=0", "--validation.every=0")
    run = read_run(recipe, [*usual, f"--output={tmp_path / 'run'}", *flags])
    told = sum(estimate(workload_of(run)).memory.values())
    trained, peaks = loop.train, []

    def training(**named: Any) -> Any:
        gc.collect()
        alive.peak = alive.now  # what encoding has taken is over
        try:
            return trained(**named)
        finally:
            peaks.append(alive.peak)

    monkeypatch.setattr(runs, "train", training)
    with Alive() as alive:
        runs.align(run, lambda line: None)
    assert told == pytest.approx(peaks[0], rel=tolerance)
