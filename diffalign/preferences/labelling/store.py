"""Human answers: an append-only file that survives a kill at any moment, and labels derived from it."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from errno import ENOSPC
from itertools import combinations
from pathlib import Path
from threading import Lock
from typing import Any

from diffalign.data.reading.examples import digest
from diffalign.errors import UserError
from diffalign.preferences.labelling.tasks import Task
from diffalign.rollout.labels import TEMPLATE
from diffalign.utils.files import write_atomic
from diffalign.utils.intervals import Estimate, wilson
from diffalign.utils.text import json_lines

ANSWERS = "answers.jsonl"
LABELS = "labels.jsonl"
BLIND = "blind.jsonl"
LOCK = ".answers.lock"
"""Lock that a process holds while it has a store open: derived labels are those of its own answers."""
TIE, SKIP = "tie", "skip"


@dataclass(frozen=True)
class Answer:
    """A person's answer to a task.

    Attributes:
        task: key of the task.
        by: name of the person.
        choice: index of the best in ``Task.media``, `TIE` or `SKIP`.
    """

    task: str
    by: str
    choice: int | str

    def scores(self, count: int) -> list[float] | None:
        """Return scores of K = ``count`` images: 1 for the best and 0 for the others, or 0.5 each for a tie.

        A skipped task gives None.
        """
        if self.choice == SKIP:
            return None
        if self.choice == TIE:
            return [0.5] * count
        return [float(place == self.choice) for place in range(count)]


class AnswerStore:
    """The answers to a list of tasks; the newest answer of each person to each task counts.

    Every answer is a line of ``answers.jsonl``, which is synced to disk before the page confirms it. A last
    line cut off by a kill is dropped when the file is opened. The derived labels are rewritten atomically
    after each answer.
    """

    def __init__(
        self, tasks: Sequence[Task], folder: Path, write: "Callable[[AnswerStore], None] | None" = None
    ):
        """Open the store.

        Args:
            tasks: all tasks.
            folder: folder of ``answers.jsonl``.
            write: function that writes the derived labels; None: `write_labels`, for ``diffalign train``.

        Raises:
            UserError: the file of answers has a malformed line, or an answer to an unknown task.
        """
        self.tasks = {task.key: task for task in tasks}
        self.folder, self._write, self._lock = folder, write or write_labels, Lock()
        self._file = folder / ANSWERS
        self._given: dict[str, dict[str, Answer]] = defaultdict(dict)  # by task, then by person
        self._order: dict[str, list[str]] = defaultdict(list)  # each person's answered tasks, newest last
        self.dropped = self._read()
        self._write(self)

    def _read(self) -> int:
        """Read the answers; return how many cut lines were dropped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._file.exists():
            return 0
        content = self._file.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:  # the process was killed during a write
            write_atomic(self._file, complete)
        for where, row in json_lines(self._file):
            key, by, choice = row.get("task"), row.get("by"), row.get("choice")
            task = self.tasks.get(key) if isinstance(key, str) else None
            if task is None:
                raise UserError(
                    f"{where}: task {key!r} is not among the {len(self.tasks)} tasks; allowed: the images "
                    f"that were labelled before, or answers elsewhere: move {self._file} away, or choose "
                    "another --output"
                )
            if not isinstance(by, str) or not (row.get("undo") or is_choice(choice, len(task.media))):
                raise UserError(
                    f"{where}: by={by!r}, choice={choice!r} is no answer; allowed: a name, and 0 to "
                    f"{len(task.media) - 1}, {TIE} or {SKIP}"
                )
            self._apply(row)
        return int(complete != content)

    def _apply(self, row: Mapping[str, Any]) -> None:
        task, by = row["task"], row["by"]
        if task in self._order[by]:
            self._order[by].remove(task)
        if row.get("undo"):
            self._given[task].pop(by, None)
            return
        self._given[task][by] = Answer(task, by, row["choice"])
        self._order[by].append(task)

    def add(self, answer: Answer) -> None:
        """Store an answer; it is on disk when this returns."""
        self._append({"task": answer.task, "by": answer.by, "choice": answer.choice})

    def undo(self, by: str) -> str | None:
        """Revoke the newest answer of person ``by``; return its task, or None if there is none."""
        with self._lock:
            newest = self._order[by][-1] if self._order[by] else None
        if newest is not None:
            self._append({"task": newest, "by": by, "undo": True})
        return newest

    def _append(self, row: dict[str, Any]) -> None:
        row["at"] = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:
            append_synced(self._file, (json.dumps(row, ensure_ascii=False) + "\n").encode())
            self._apply(row)
            self._write(self)

    def answer(self, task: str, by: str) -> Answer | None:
        """Return the answer of person ``by`` to a task, or None if there is none."""
        return self._given[task].get(by)

    def answered(self, by: str) -> set[str]:
        """Return the keys of the tasks that person ``by`` has answered or skipped."""
        return set(self._order[by])

    def votes(self, task: str) -> int:
        """Return the number of answers to a task, without skips."""
        return sum(answer.choice != SKIP for answer in self._given[task].values())

    def counts(self) -> Counter[str]:
        """Return the number of answers of each person."""
        return Counter(by for given in self._given.values() for by in given)

    def scores(self, task: Task) -> list[float] | None:
        """Return the mean scores of a task's media over people, or None if nobody has answered it."""
        count = len(task.media)
        given = [s for a in self._given[task.key].values() if (s := a.scores(count)) is not None]
        if not given:
            return None
        return [sum(column) / len(given) for column in zip(*given, strict=True)]

    def agreement(self) -> Estimate | None:
        """Return the share of equal choices among pairs of people who answered the same task.

        It has Wilson's 95 % interval. None if no task has two answers.
        """
        same = pairs = 0
        for given in self._given.values():
            choices = [answer.choice for answer in given.values() if answer.choice != SKIP]
            for first, second in combinations(choices, 2):
                same, pairs = same + (first == second), pairs + 1
        return wilson(same, pairs) if pairs else None


def is_choice(value: Any, count: int) -> bool:
    """Return whether a value is `TIE`, `SKIP` or an index into ``count`` media."""
    if isinstance(value, str):
        return value in (TIE, SKIP)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def append_synced(file: Path, content: bytes) -> None:
    """Append to a file and sync it; after an error, such as a full disk, nothing of it stays."""
    with file.open("ab", buffering=0) as stream:
        before = stream.tell()
        try:
            if stream.write(content) != len(content):
                raise OSError(ENOSPC, os.strerror(ENOSPC), str(file))
            os.fsync(stream.fileno())
        except BaseException:
            stream.truncate(before)  # half a line would be joined with the next one
            raise


def write_labels(store: AnswerStore) -> None:
    """Write ``labels.jsonl``: one line for each answered task, in the schema of ranked lists."""
    rows = []
    for task in store.tasks.values():
        scores = store.scores(task)
        if scores is not None:
            kind = "videos" if task.video else "images"
            media = [_relative(file, store.folder) for file in task.media]
            rows.append({"prompt": task.prompt, kind: media, "scores": scores})
    write_atomic(store.folder / LABELS, _lines(rows))


def write_round(store: AnswerStore) -> None:
    """Write one file for each person, in the format of rounds of online runs (``rollout.labels``)."""
    for by in store.counts():
        rows = []
        for task in store.tasks.values():
            answer = store.answer(task.key, by)
            scores: list[float] | list[None] = [None] * len(task.media)
            if answer:
                scores = answer.scores(len(task.media)) or scores
            names = [file.name for file in task.media]
            rows.append({"prompt": task.prompt, "images": names, "scores": scores})
        write_atomic(store.folder / f"{Path(TEMPLATE).stem}-{file_name(by)}.jsonl", _lines(rows))


def write_blind(store: AnswerStore) -> None:
    """Write ``blind.jsonl`` beside the labels: people's scores of base and aligned, for the report."""
    write_labels(store)
    rows = []
    for task in store.tasks.values():
        scores = store.scores(task)
        if scores is not None:
            base, aligned = scores
            row = {"model": task.models[1], "prompt": task.prompt, "base": base, "aligned": aligned}
            names = [file.name for file in task.media]
            rows.append(row | {"votes": store.votes(task.key), "images": names})
    write_atomic(store.folder / BLIND, _lines(rows))


def file_name(person: str) -> str:
    """Return a file name for a person's name without unsafe characters; distinct names stay distinct."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", person)[:40]
    return safe if safe == person else f"{safe}-{digest(person.encode())[:8]}"


def _relative(file: Path, folder: Path) -> str:
    file, folder = file.resolve(), folder.resolve()
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
