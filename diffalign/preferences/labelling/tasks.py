"""Comparison tasks for people.

They are read from a folder of samples, a preference set, a round of an online run, or two models' samples.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.config.schema import DataConfig
from diffalign.data.reading.examples import Example, ImageRef, digest
from diffalign.data.reading.readers import read_preferences
from diffalign.errors import UserError
from diffalign.evaluation.drawing.samples import Sample, read_samples
from diffalign.media.videos import VIDEO_SUFFIXES
from diffalign.rollout.labels import TEMPLATE
from diffalign.utils.files import write_atomic
from diffalign.utils.text import json_lines

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


def read_tasks(path: str, output: Path, limit: int | None = None) -> list[Task]:
    """Read the tasks of a folder of samples, of a round of an online run, or of a preference set.

    Args:
        path: an output of ``diffalign generate`` with several images of each prompt; ``rollouts/round-NNNN``
            of a run that waits for labels; or any value of ``data.path``.
        output: folder to write embedded images to.
        limit: largest number of tasks; None: all.

    Raises:
        UserError: nothing to compare, or more than `MOST` images of one prompt.
    """
    folder = Path(path).expanduser()
    if is_round(folder):
        tasks = _of_round(folder)
    elif any(folder.glob("manifest*.jsonl")):
        tasks = _of_samples(read_samples(folder), path)
    else:
        tasks = _of_preferences(path, output / "media", limit)
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
        key = digest(*map(str.encode, (*names, prompt, str(position), str(number))))[:16]
        tasks.append(Task(key, prompt, media, names))
    return tasks


def _file(sample: Sample) -> Path:
    assert isinstance(sample.source, Path)  # read_samples gives files
    return sample.source


def _of_round(folder: Path) -> list[Task]:
    tasks = []
    for _, row in json_lines(folder / TEMPLATE):
        names = row["images"]
        tasks.append(Task(str(names[0]), row["prompt"], tuple(folder / name for name in names)))
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
        tasks.append(Task(f"{position:05d}", prompt, tuple(_file(sample) for sample in group)))
    return tasks


def _of_preferences(path: str, folder: Path, limit: int | None) -> list[Task]:
    """Return the groups of a preference set as tasks; labels are neither shown nor needed."""
    preferences = read_preferences(DataConfig(path=path, limit=limit), seed=0)
    write = _writer(folder)
    tasks: dict[str, Task] = {}
    for example in preferences.rows():
        if isinstance(example, Example) and example.source is not None:
            raise UserError(
                f"{example.where}: a source image, which the page would not show; allowed: sets without "
                "sources"
            )
        if isinstance(example, Example) and len(example.images) > 1 and not example.prompts:
            media = tuple(write(image) for image in example.images)
            key = digest(example.prompt.encode(), *(file.name.encode() for file in media))[:16]
            tasks[key] = Task(key, example.prompt, media)
    return list(tasks.values())


def _writer(folder: Path) -> Callable[[ImageRef], Path]:
    """Return a function that gives an image's file; embedded images are written once, under their digest."""

    def write(image: ImageRef) -> Path:
        if isinstance(image.source, Path):
            return image.source
        content = image.read()
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
