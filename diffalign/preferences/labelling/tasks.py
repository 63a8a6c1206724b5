"""Comparison tasks for people.

They are read from a folder of samples, a preference set, a round of an online run, or two models' samples.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffalign.config.schema import DataConfig
from diffalign.data.reading.examples import ImageRef, Skipped, digest
from diffalign.data.reading.readers import read_preferences
from diffalign.errors import UserError
from diffalign.evaluation.drawing.samples import Sample, read_samples
from diffalign.media.videos import VIDEO_SUFFIXES
from diffalign.rollout.labels import TEMPLATE
from diffalign.utils.files import write_atomic
from diffalign.utils.text import json_lines

logger = logging.getLogger(__name__)

MOST = 9
"""Largest number of images of a task: the page has a key for each."""


@dataclass(frozen=True)
class Task:
    """One comparison of images or videos of a prompt.

    Attributes:
        key: identifier in the file of answers, stable between sessions.
        prompt: the prompt.
        media: K files, 2 to `MOST`, in the order of the scores.
        models: in a blind comparison of models, the model that drew each of them; else empty.
    """

    key: str
    prompt: str
    media: tuple[Path, ...]
    models: tuple[str, ...] = ()

    @property
    def video(self) -> bool:
        """Whether the media are videos."""
        return self.media[0].suffix.lower() in VIDEO_SUFFIXES


def read_tasks(
    path: str, output: Path, limit: int | None = None, reading: Mapping[str, Any] = MappingProxyType({})
) -> list[Task]:
    """Read the tasks of a folder of samples, of a round of an online run, or of a preference set.

    Args:
        path: an output of ``diffalign generate`` with several images of each prompt; ``rollouts/round-NNNN``
            of a run that waits for labels; or any value of ``data.path``.
        output: folder to write embedded images to.
        limit: largest number of tasks; None: all.
        reading: further settings of ``data`` with which a preference set is read.

    Raises:
        UserError: nothing to compare, more than `MOST` images of one prompt, or ``reading`` of what is no
            preference set.
    """
    folder = Path(path).expanduser()
    drawn = is_round(folder) or any(folder.glob("manifest*.jsonl"))
    if drawn and reading:
        raise UserError(
            f"{path} is a folder of drawn images, with {', '.join(reading)}; allowed: with a preference set"
        )
    if is_round(folder):
        tasks = _of_round(folder)
    elif drawn:
        tasks = _of_samples(read_samples(folder), path)
    else:
        tasks = _of_preferences(DataConfig(path=path, limit=limit, **reading), output / "media")
    for task in tasks:
        if not 2 <= len(task.media) <= MOST:
            raise UserError(
                f"{path}: {len(task.media)} images of {task.prompt[:60]!r}; allowed: 2 to {MOST} to compare"
            )
    if not tasks:
        raise UserError(f"{path}: nothing to compare; allowed: prompts with two images or more")
    return tasks[:limit]


def is_round(folder: Path) -> bool:
    """Return whether a folder is a round of an online run with human judges."""
    return (folder / TEMPLATE).is_file() and folder.name.rpartition("-")[0].endswith("round")


def blind_tasks(folders: dict[str, Path], limit: int | None = None) -> list[Task]:
    """Pair the samples of two models of the same prompt and noise.

    Args:
        folders: two folders of samples, by the model's name.
        limit: largest number of pairs; None: all.

    Raises:
        UserError: the models have no prompt and number in common.
    """
    by_model = {
        name: {(s.prompt, s.position, s.number): s for s in read_samples(folder)}
        for name, folder in folders.items()
    }
    first, second = by_model.values()
    shared = [place for place in first if place in second]
    if not shared:
        raise UserError(
            f"{' and '.join(map(str, folders.values()))} share no prompt; allowed: one prompt set"
        )
    names = tuple(folders)
    tasks = []
    for prompt, position, number in shared[:limit]:
        media = tuple(_file(samples[prompt, position, number]) for samples in (first, second))
        tasks.append(Task(_key(prompt, media, *names, position, number), prompt, media, names))
    return tasks


def _file(sample: Sample) -> Path:
    assert isinstance(sample.source, Path)  # read_samples gives files
    return sample.source


def _of_round(folder: Path) -> list[Task]:
    tasks = []
    for where, row in json_lines(folder / TEMPLATE):
        names, prompt = row.get("images"), row.get("prompt")
        names = names if isinstance(names, list) else []
        if not names or not all(isinstance(name, str) for name in names) or not isinstance(prompt, str):
            raise UserError(
                f"{where}: no prompt and images; allowed: the lines as the run wrote them, or more"
            )
        tasks.append(Task(names[0], prompt, tuple(folder / name for name in names)))
    return tasks


def _of_samples(samples: Sequence[Sample], path: str) -> list[Task]:
    by_prompt: dict[tuple[int, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_prompt[sample.position, sample.prompt].append(sample)
    tasks = []
    for (position, prompt), group in by_prompt.items():
        if len(group) < 2:
            raise UserError(
                f"{path}: one image of {prompt[:60]!r}; allowed: several of each prompt, by "
                "`diffalign generate --images-per-prompt 2`"
            )
        media = tuple(_file(sample) for sample in group)
        tasks.append(Task(_key(prompt, media, position), prompt, media))
    return tasks


def _key(prompt: str, media: Sequence[Path], *more: str | int) -> str:
    """Return the key of a task: answers about other images, or other names of them, are of another task.

    The names of samples depend on their noise, settings and weights.
    """
    return digest(*(str(part).encode() for part in (prompt, *more, *(file.name for file in media))))[:16]


def _of_preferences(config: DataConfig, folder: Path) -> list[Task]:
    """Return the groups of a preference set as tasks, whose labels are not shown; tell what is left out."""
    preferences = read_preferences(config, seed=0)
    write = _writer(folder)
    tasks: dict[str, Task] = {}
    left: dict[str, list[str]] = defaultdict(list)  # places, by why they are left out
    for example in preferences.rows():
        if isinstance(example, Skipped):
            left[example.cause].append(f"{example.where}: {example.reason}")
            continue
        if example.source is not None:
            raise UserError(
                f"{example.where}: a source image, which the page would not show; allowed: sets without "
                "sources"
            )
        if len(example.images) < 2 or example.prompts:
            left["of one image"].append(example.where)
            continue
        try:
            media = tuple(write(image) for image in example.images)
        except OSError as error:
            left["unreadable"].append(f"{example.where}: {error}")
            continue
        key = _key(example.prompt, media)
        if key in tasks and tasks[key].media != media:  # other folders, equal names
            key = _key(example.prompt, media, *(str(file.parent) for file in media))
        if key in tasks:
            left["there already"].append(example.where)
        tasks[key] = Task(key, example.prompt, media)
    for cause, places in left.items():
        rows = "row is" if len(places) == 1 else "rows are"
        logger.warning("%s: %d %s left out, %s, such as %s", config.path, len(places), rows, cause, places[0])
    return list(tasks.values())


def _writer(folder: Path) -> Callable[[ImageRef], Path]:
    """Return a function that gives an image's file; embedded images are written once, under their digest."""

    def write(image: ImageRef) -> Path:
        found = image.file
        if isinstance(found, Path) and found.is_file():
            return found
        content = found if isinstance(found, bytes) else image.read()  # which names what is missing
        file = folder / f"{digest(content)[:16]}{suffix(content)}"
        if not file.is_file():
            write_atomic(file, content)
        return file

    return write


_MAGIC = (
    (b"\x89PNG", ".png"),
    (b"\xff\xd8", ".jpg"),
    (b"GIF8", ".gif"),
    (b"RIFF", ".webp"),
    (b"\x1a\x45\xdf\xa3", ".webm"),
)


def suffix(content: bytes) -> str:
    """Return the file suffix of an encoded image or video, by its first bytes."""
    if content[4:8] == b"ftyp":
        return ".mp4"
    return next((name for magic, name in _MAGIC if content.startswith(magic)), ".img")


def in_order(
    tasks: Iterable[Task], order: str, seed: int, disagreement: Callable[[Task], float] | None = None
) -> list[Task]:
    """Return tasks in the order in which they are shown.

    Args:
        tasks: the tasks.
        order: ``given``; ``random``, by a digest of seed and key; ``disagreement``, the largest first.
        seed: seed of the random order.
        disagreement: disagreement of rewards on a task, in [0, 1] (``results.disagreement_of``).

    Raises:
        UserError: the order is ``disagreement`` and there is no such function.
    """
    tasks = list(tasks)
    if order == "random":
        tasks.sort(key=lambda task: digest(str(seed).encode(), task.key.encode()))
    if order == "disagreement":
        if disagreement is None:
            raise UserError("--order disagreement needs --rewards; allowed: two rewards or more")
        tasks.sort(key=lambda task: -disagreement(task))
    return tasks


def write_index(tasks: Sequence[Task], file: Path) -> None:
    """Write the prompts and files of the tasks as JSON lines, for other programs that read the answers."""
    rows = [
        {"task": t.key, "prompt": t.prompt, "media": [str(m) for m in t.media], "models": list(t.models)}
        for t in tasks
    ]
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
