"""Rounds on disk, so that a run that is killed within a round resumes without sampling it again.

<folder>/round-000003/part-<rank>-<number>.pt   states, means, scores; removed when the round is old
<folder>/round-000003/scores.jsonl              prompts and scores
<folder>/round-000003/history.json              rewards of earlier rounds, for statistics
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from diffalign.rollout.advantages import PromptHistory
from diffalign.utils.files import open_atomic, write_atomic

Part = dict[str, Tensor]


@dataclass(frozen=True)
class RoundStore:
    """The rounds of one run as one rank sees them.

    Attributes:
        folder: where they are; None keeps nothing.
        rank: of this process.
        keep: rounds whose states are kept; 0 keeps all.
    """

    folder: Path | None
    rank: int = 0
    keep: int = 2

    def round(self, number: int) -> Path:
        """Return the folder of a round.

        Raises:
            ValueError: nothing is kept.
        """
        if self.folder is None:
            raise ValueError("rounds that are not kept have no folder")
        return self.folder / f"round-{number:06d}"

    def load(self, number: int, start: int) -> Part | None:
        """Return the part of a round that begins with this rank's prompt ``start``, if it is there."""
        if not self.has(number, start):
            return None
        part: Part = torch.load(self._part(number, start), weights_only=True)
        return part

    def has(self, number: int, start: int) -> bool:
        """Return whether a part is on disk."""
        return self.folder is not None and self._part(number, start).is_file()

    def save(self, number: int, start: int, part: Part) -> None:
        """Write a part atomically."""
        if self.folder is not None:
            with open_atomic(self._part(number, start)) as file:
                torch.save(part, file)

    def history(self, number: int) -> PromptHistory:
        """Return the history of rewards after round ``number``."""
        file = None if self.folder is None else self.round(number) / "history.json"
        if file is None or not file.is_file():
            return PromptHistory()
        return PromptHistory.from_json(file.read_text(encoding="utf-8"))

    def write_history(self, number: int, history: PromptHistory) -> None:
        """Write the history of rewards after round ``number``."""
        if self.folder is not None and self.rank == 0:
            write_atomic(self.round(number) / "history.json", history.to_json())

    def write_scores(self, number: int, prompts: Sequence[str], scores: Mapping[str, Tensor]) -> None:
        """Write prompts with their scores (N, K) by name."""
        if self.folder is None or self.rank:
            return
        rows = [
            {"prompt": prompt, **{name: values[i].tolist() for name, values in scores.items()}}
            for i, prompt in enumerate(prompts)
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(self.round(number) / "scores.jsonl", lines)

    def forget_after(self, number: int) -> None:
        """Remove later rounds, which another policy has sampled; rounds with people's labels are moved
        aside."""
        for other, folder in self._rounds():
            if other <= number or self.rank:
                continue
            if any(folder.glob("labels*.jsonl")):
                folder.rename(folder.with_name(f"left-{folder.name}-{uuid4().hex[:8]}"))
            else:
                shutil.rmtree(folder)

    def forget_before(self, number: int, but: int) -> None:
        """Remove this rank's states of old rounds once round ``number`` is there; scores and the round
        ``but`` stay.
        """
        for old, folder in self._rounds():
            if self.keep and old <= number - self.keep and old != but:
                for path in folder.glob(f"part-{self.rank}-*.pt"):
                    path.unlink()

    def _part(self, number: int, start: int) -> Path:
        return self.round(number) / f"part-{self.rank}-{start:06d}.pt"

    def _rounds(self) -> list[tuple[int, Path]]:
        if self.folder is None or not self.folder.is_dir():
            return []
        return [(int(p.name.removeprefix("round-")), p) for p in sorted(self.folder.glob("round-*"))]


NOWHERE = RoundStore(None)
"""Keeps nothing."""
