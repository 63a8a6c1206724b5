"""Labels by people: a folder of a round's images and a file of scores.

``labels.jsonl`` has one line a prompt, which `write_template` leaves unscored:

    {"prompt": "a cat", "images": ["0000-0.png", "0000-1.png"], "scores": [null, null]}

Scores are numbers, higher is better, equal ones are a tie; 1 and 0 for liked and not are scores too (as in
D3PO, arXiv 2311.13231), and ``"best": 1`` instead of ``scores`` names the only liked image, counted from 0.
Several people label copies of the file, such as ``labels-anna.jsonl``; a line's scores are the mean over the
people who scored it. A line without ``images`` belongs to the prompt at its place in the file.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffalign.errors import Paused, UserError
from diffalign.rewards.images import to_pil
from diffalign.utils.files import open_atomic, write_atomic
from diffalign.utils.text import json_lines

TEMPLATE = "labels.jsonl"
_FILES = "labels*.jsonl"


@dataclass(frozen=True)
class _Line:
    """A line of a labels file and its place."""

    where: str
    place: int
    row: dict[str, Any]


def image_name(number: int, sample: int) -> str:
    """Return the file of a prompt's sample: ``0003-1.png``, both counted from 0."""
    return f"{number:04d}-{sample}.png"


def write_template(
    folder: Path, prompts: Sequence[str], images: Sequence[Sequence[Image.Image | Tensor]]
) -> Path:
    """Write a round's images, then ``labels.jsonl``, so that the file exists only if all images do; return
    it.

    Args:
        folder: of the round.
        prompts: N.
        images: the samples of each prompt, PIL images or pixels (3, H, W) in [0, 1].

    Raises:
        UserError: a labels file of the folder has scores, or cannot be read; the file is not changed.
        ValueError: the numbers of prompts and of rows of images differ.
    """
    for line in _all_lines(folder):
        if line.row.get("best") is not None or any(s is not None for s in _listed(line.row.get("scores"))):
            raise UserError(
                f"{line.where} has been labelled already and is not written over; allowed: a folder without "
                "labels"
            )
    rows = []
    for number, (prompt, samples) in enumerate(zip(prompts, images, strict=True)):
        names = [image_name(number, k) for k in range(len(samples))]
        for name, sample in zip(names, samples, strict=True):
            picture = to_pil(sample[None] if isinstance(sample, Tensor) else [sample])[0]
            with open_atomic(folder / name) as file:
                picture.save(file, format="PNG")
        rows.append({"prompt": prompt, "images": names, "scores": [None] * len(names)})
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomic(folder / TEMPLATE, "".join(lines))
    return folder / TEMPLATE


def read_labels(folder: Path, prompts: Sequence[str], samples: int) -> Float[Tensor, "N K"] | None:
    """Return the scores of a round, float32; None while a prompt has no scores.

    Args:
        folder: of the round.
        prompts: N, as they were given to `write_template`.
        samples: K, of each prompt.

    Raises:
        UserError: names file and line of what is not JSON, has another prompt or other images, occurs twice,
            or has other than K numbers as scores.
    """
    given: list[list[list[float]]] = [[] for _ in prompts]
    seen: set[tuple[str, int]] = set()
    for line in _all_lines(folder):
        number = _number(line, prompts, samples)
        file = line.where.rpartition(" line ")[0]
        if (file, number) in seen:
            raise UserError(f"{line.where}: prompt {number} has a line above already; allowed: one")
        seen.add((file, number))
        scores = _scores(line, samples)
        if scores is not None:
            given[number].append(scores)
    if not all(given):
        return None
    return torch.stack([torch.tensor(one, dtype=torch.float64).mean(0) for one in given]).float()


def progress(folder: Path) -> str:
    """Return how many prompts are labelled: ``3 of 8 prompts labelled in labels.jsonl``, for each file.

    Raises:
        UserError: a line that cannot be read, with its file and number.
    """
    counts: list[str] = []
    for path in sorted(folder.glob(_FILES)):
        lines = list(_lines(path))
        done = sum(_scores(line, None) is not None for line in lines)
        counts.append(f"{done} of {len(lines)} {'' if counts else 'prompts labelled '}in {path.name}")
    return ", ".join(counts) or f"no labels*.jsonl in {folder}"


def _all_lines(folder: Path) -> Iterator[_Line]:
    for path in sorted(folder.glob(_FILES)):
        yield from _lines(path)


def _lines(path: Path) -> Iterator[_Line]:
    """Return the lines of a file that are not empty."""
    lines = json_lines(path, '{"prompt": ..., "scores": [...]}')
    return (_Line(where, place, row) for place, (where, row) in enumerate(lines))


def _number(line: _Line, prompts: Sequence[str], samples: int) -> int:
    """Return the number of a line's prompt: by the names of its images, else by its place."""
    names, number = line.row.get("images"), line.place
    if names is not None:
        first = re.fullmatch(r"(\d+)-0\.png", str(names[0])) if _listed(names) else None
        number = int(first[1]) if first else len(prompts)
        expected = [image_name(min(number, len(prompts) - 1), k) for k in range(samples)]
        if names != expected:
            raise UserError(
                f"{line.where}: images={names!r}; allowed: the {samples} images of one of the round's "
                f"{len(prompts)} prompts, such as {expected}"
            )
    if number >= len(prompts):
        raise UserError(f"{line.where}: one line too many; allowed: {len(prompts)}, one for each prompt")
    if line.row.get("prompt") != prompts[number]:
        raise UserError(f"{line.where}: prompt={line.row.get('prompt')!r}; allowed: {prompts[number]!r}")
    return number


def _scores(line: _Line, samples: int | None) -> list[float] | None:
    """Return the scores of a line; None while one is missing. ``samples`` None: as many as the line has
    images.
    """
    scores, best = line.row.get("scores"), line.row.get("best")
    if scores is not None and not isinstance(scores, list):
        raise UserError(f"{line.where}: scores={scores!r}; allowed: a list of numbers")
    count = samples if samples is not None else len(_listed(line.row.get("images") or scores))
    if scores is not None and len(scores) != count:
        raise UserError(f"{line.where}: {len(scores)} scores; allowed: {count}, one for each image")
    for score in scores or []:
        if score is not None and not _is_number(score):
            raise UserError(f"{line.where}: score {score!r} is no number; allowed: numbers, or null for none")
    if best is None:
        return None if scores is None or None in scores else [float(score) for score in scores]
    if any(score is not None for score in scores or []):
        raise UserError(f"{line.where} has both scores and best={best!r}; allowed: one of them")
    if isinstance(best, bool) or not isinstance(best, int) or best < 0 or (count and best >= count):
        raise UserError(f"{line.where}: best={best!r}; allowed: the number of an image, 0 to {count - 1}")
    return [float(k == best) for k in range(count)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def labelled(folder: Path, prompts: Sequence[str], pixels: Tensor) -> Tensor:
    """Return the (N, K) scores that people have given to a round.

    Args:
        folder: of the round; images and the labels file are written there if they are missing.
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
