"""Weighted means of metrics, which stay on the device until they are logged, and the metrics file."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from diffalign.utils.files import write_atomic
from diffalign.utils.text import read_json_lines
from diffalign.utils.transfer import sent


class Meter:
    """Weighted sums of named scalars, in float32 on one device.

    Adding does not synchronise with the device; ``averages`` synchronises once and sums over all processes in
    the order of their ranks. A metric of weight 0 (a batch of ties) is ignored, also if it is not finite.
    """

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, metrics: Mapping[str, Tensor | float], weight: Tensor | float) -> None:
        """Add scalars, each of which is a mean over ``weight`` terms."""
        w = self._scalar(weight)
        for name, value in metrics.items():
            v = self._scalar(value)
            self._accumulate(name, torch.where(w > 0, v * w, torch.zeros_like(w)), w)

    def merge(self, other: "Meter", prefix: str = "") -> None:
        """Add the sums of another meter, with ``prefix`` before their names."""
        for name, (total, weight) in other._sums.items():
            self._accumulate(prefix + name, total, weight)

    def averages(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all ranks, equal on all ranks (a collective operation)."""
        totals: dict[str, tuple[float, float]] = {}
        for rank in self.of_all_ranks(accelerator):
            for name, (total, weight) in rank.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + total, before[1] + weight)
        return {name: total / weight for name, (total, weight) in totals.items() if weight > 0}

    def of_all_ranks(self, accelerator: Accelerator) -> list[dict[str, tuple[float, float]]]:
        """Return the ``state_dict`` of each rank, in the order of ranks (a collective operation)."""
        own_state = [self.state_dict()]
        # Objects instead of a stacked tensor: a rank without held-out batches has no names.
        return gather_object(own_state) if accelerator.num_processes > 1 else own_state

    def clear(self) -> None:
        """Reset all sums."""
        self._sums = {}

    def state_dict(self) -> dict[str, tuple[float, float]]:
        """Return (weighted sum, weight) by name."""
        names = sorted(self._sums)
        if not names:
            return {}
        values = torch.stack([t for name in names for t in self._sums[name]]).tolist()
        return {name: (values[2 * i], values[2 * i + 1]) for i, name in enumerate(names)}

    def load_state_dict(self, state: Mapping[str, Iterable[float]]) -> None:
        """Restore the sums from a checkpoint."""
        for name, (total, weight) in state.items():
            self._sums[name] = (self._scalar(total), self._scalar(weight))

    def load_of_ranks(self, states: Sequence[Mapping[str, Iterable[float]]], rank: int, ranks: int) -> None:
        """Restore from a checkpoint's ``of_all_ranks``; rank 0 takes all if the number of ranks differs."""
        selected = states[rank : rank + 1] if len(states) == ranks else states if rank == 0 else ()
        for state in selected:
            other = Meter(self._device)
            other.load_state_dict(state)
            self.merge(other)

    def _accumulate(self, name: str, total: Tensor, weight: Tensor) -> None:
        if name in self._sums:
            before = self._sums[name]
            total, weight = before[0] + total, before[1] + weight
        self._sums[name] = (total, weight)

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return sent(value.detach(), self._device).to(torch.float32)
        return torch.full((), value, dtype=torch.float32, device=self._device)  # no copy, so no wait


class MetricsFile:
    """The file ``metrics.jsonl``, one line ``{"step": N, ...}`` per record, flushed after each.

    Opening it for a run that resumes after step N removes later records and an incomplete last line; a fresh
    run (N = 0) starts with an empty file. What step N has a value of already is not written again: a run that
    is resumed with nothing left to train measures its end once more.
    """

    def __init__(self, path: Path, start_step: int):
        self.path = Path(path)
        records = [r for r in read_json_lines(self.path) if 0 < r["step"] <= start_step]
        self._start = start_step
        self._known = {name for r in records if r["step"] == start_step for name in r}
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in records))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record; numbers that are not finite are written as null, which is valid JSON."""
        known = self._known if step == self._start else set()
        new = {name: value if math.isfinite(value) else None for name, value in values.items()}
        new = {name: value for name, value in new.items() if name not in known}
        if new:
            self._file.write(json.dumps({"step": step, **new}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
