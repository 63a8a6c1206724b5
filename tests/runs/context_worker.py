"""What each process does in ``test_context``: whole runs whose tokens are shared by two processes.

``python -m tests.ranks N tests.runs.context_worker FOLDER CASE...``
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffalign.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    TrainingConfig,
)
from diffalign.runs.align import align

STEPS = 6
CASES = ("flux", "wan", "full")


def recipe(folder: Path, case: str, groups: int = 1, **training: Any) -> Run:
    """Configure DPO of a tiny random model: 4 pairs a step by so many groups of processes."""
    family = "flux" if case == "full" else case
    size: dict[str, Any] = {"resolution": 32}
    if case == "wan":
        size = {"resolution": 32, "frames": 5}
    run = Run(
        output=str(folder / case),
        method={"type": "dpo", "beta": 10},
        model=ModelConfig(
            path=str(folder / family),
            train="full" if case == "full" else "lora",
            # the last layer, whose output the processes gather, as well
            lora=LoraConfig(rank=2, targets=("to_q", "to_v", "proj_out")),
            gradient_checkpointing=case == "wan",
        ),
        data=DataConfig(
            path="tiny:video_takes" if case == "wan" else "tiny:pairs", limit=14, holdout=0.15, **size
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-2 if case != "full" else 1e-3, type="adafactor" if case == "full" else "adamw"
        ),
        training=TrainingConfig(
            steps=STEPS // groups, batch_size=2 // groups, accumulation=2, ema_decay=0.5, **training
        ),
        logging=LoggingConfig(every=4, trackers=(), diagnostics_bins=1),
        checkpoint=CheckpointConfig(every=3, limit=0),
    )
    if case == "wan":
        drawn = replace(run.validation, every=3, prompts=("a",), sampling_steps=1, guidance=2.0)
        return replace(run, validation=drawn)
    if case == "full":
        return replace(run, training=replace(run.training, reference_every=2, reference_mix=0.5))
    return replace(run, logging=replace(run.logging, every=1, diagnostics_every=3))


def main() -> None:
    """Train each case in groups of two, 4 pairs a step."""
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    lines: list[str] = []
    groups = int(os.environ["WORLD_SIZE"]) // 2
    for case in cases:
        run = recipe(folder, case, groups, context=2)
        align(replace(run, output=str(folder / f"{case}-{groups}")), lines.append)
    rank = torch.distributed.get_rank()
    (folder / f"lines-{groups}-{rank}.txt").write_text("\n".join(lines))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
