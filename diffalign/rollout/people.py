"""Rounds that people judge: images and a labels file, and a run that waits for them."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from diffalign.errors import Paused
from diffalign.rollout.labels import progress, read_labels, write_template


def labelled(folder: Path, prompts: Sequence[str], pixels: Tensor) -> Tensor:
    """(N, K) scores that people have given to a round.

    Args:
        folder: of the round; images and the labels file are put there if they are not.
        prompts: N.
        pixels: (N, K, 3, H, W) uint8.

    Raises:
        Paused: some prompt has no label yet.
        UserError: the labels file does not fit the round.
    """
    if not (folder / "labels.jsonl").is_file():
        write_template(folder, prompts, [list(images.float() / 255) for images in pixels])
    scores = read_labels(folder, prompts, pixels.shape[1])
    if scores is None:
        raise Paused(
            f"{progress(folder)}: look at the images in {folder}, put a score for each into labels.jsonl "
            "(higher is better, equal is a tie), then continue with --resume latest"
        )
    return scores
