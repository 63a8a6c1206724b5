"""Online runs on videos of random models, and what each of two processes does in ``test_video_rollouts``.

``python -m tests.ranks 2 tests.runs.video_worker MODEL OUTPUT``
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    Run,
    TrainingConfig,
)
from diffalign.media.videos import Video
from diffalign.runs.align import align
from diffalign.training.acceleration import accelerator_for

FRAMES = {"wan": 5, "text_to_video": 3}
GROUPS = {"advantage": "group_batch"}
METHODS: dict[str, dict[str, Any]] = {
    "flow_grpo": GROUPS,
    "ddpo": {"advantage": "group", "eta": 1.0, "steps": 2},
    "d3po": {"eta": 1.0, "steps": 2},
    "spo": {"first_branch": 1, "samples": 3, "eta": 1.0},
    "dpo": {},
    "diffusion_nft": GROUPS | {"eta": 0.0},
    "awm": GROUPS | {"eta": 0.0},
    "dgpo": {"advantage": "group_std", "eta": 0.0},
}
STRATIFIED = ("awm", "diffusion_nft", "dgpo")  # noise each sample at several times; once here


def change(videos: Sequence[Video], prompts: Sequence[str]) -> Tensor:
    """(B,): how bright videos are and how much frames differ from the one before."""
    found = []
    for video in videos:
        frames = video.frames.double() / 255
        found.append(float(frames.mean() + (frames[1:] - frames[:-1]).abs().mean()) + video.fps)
    return torch.tensor(found)


change.video = True  # type: ignore[attr-defined]  # judges videos (rewards.imported)


def run_of(
    path: str, output: Path, method: str = "flow_grpo", family: str = "wan", world: int = 1, **rollout: Any
) -> Run:
    """Configure rounds of two prompts, of two optimizer steps where two steps of the sampler are draws."""
    prompts = output.parent / "prompts.txt"
    if not prompts.exists():  # written before processes are started, which would read it half written
        prompts.write_text("a cat\na dog runs\nrain\n")
    usual = {
        "prompts": str(prompts), "prompts_per_round": 2 // world, "samples": 2, "shared_noise": False,
        "steps": 3, "eta": 0.7, "guidance": 1.0, "batch_size": 4, "decoded_frames": 2 * FRAMES[family],
        "rewards": ("tests.runs.video_worker:change",),
    }  # fmt: skip
    targets = ("to_q", "to_v")
    return Run(
        output=str(output),
        method={"type": method} | ({"time": {"strata": 1}} if method in STRATIFIED else {}),
        model=ModelConfig(path=path, max_sequence_length=16 if family == "wan" else None,
                          lora=LoraConfig(rank=2, targets=targets)),
        data=DataConfig(height=32, width=32, frames=FRAMES[family], fps=6.0),
        rollout=RolloutConfig(**{**usual, **METHODS[method], **rollout}),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        training=TrainingConfig(steps=4, batch_size=2 // world),
        logging=LoggingConfig(every=1, trackers=()),
        checkpoint=CheckpointConfig(every=4),
    )  # fmt: skip


def main() -> None:
    path, output = sys.argv[1:]
    world = accelerator_for(TrainingConfig()).num_processes
    align(run_of(path, Path(output), world=world), lambda line: None)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
