"""What each of two processes does in ``test_sharding``: whole runs whose weights are spread over both.

``python -m tests.ranks 2 tests.runs.shard_worker FOLDER``
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from diffalign.config.schema import Run
from diffalign.runs.align import align
from diffalign.runs.validate import read_run

STEPS = 10


def recipe(output: Path, train: str, world: int, steps: int = STEPS, **training) -> Run:
    """Configure a run of the tiny SDXL with equal work for any number of processes: 8 pairs a step."""
    run = read_run("tiny_sdxl_dpo")
    lora = replace(run.model.lora, rank=4, targets=("to_q", "to_v"))
    return replace(
        run,
        output=str(output),
        model=replace(run.model, train=train, lora=lora),
        data=replace(run.data, limit=20, holdout=0.15, cache_batch_size=8),
        optimizer=replace(run.optimizer, learning_rate=1e-3 if train == "lora" else 1e-5),
        training=replace(run.training, steps=steps, batch_size=8 // world, **training),
        logging=replace(run.logging, every=1, diagnostics_bins=1, trackers=()),
        checkpoint=replace(run.checkpoint, every=steps, limit=0),
    )


def variant(run: Run, train: str) -> Run:
    """Add what must hold under either: averaged weights, a moving reference or checkpointed activations."""
    if train == "full":
        moving = replace(run.training, reference_every=4, reference_mix=0.5)
        return replace(run, training=moving)
    return replace(run, model=replace(run.model, gradient_checkpointing=True))


def main() -> None:
    folder = Path(sys.argv[1])
    lines: list[str] = []
    for train in ("lora", "full"):
        run = variant(recipe(folder / train, train, 2, shard="full", ema_decay=0.9), train)
        if train == "lora":
            drawn = replace(run.validation, every=5, prompts=("a red circle",), sampling_steps=1)
            run = replace(run, validation=drawn)
        align(run, lines.append)
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if the processes were on two nodes
    align(recipe(folder / "hybrid", "lora", 2, steps=3, shard="hybrid", reshard=False), lines.append)
    rank = torch.distributed.get_rank()
    (folder / f"lines-{rank}.txt").write_text("\n".join(lines))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
