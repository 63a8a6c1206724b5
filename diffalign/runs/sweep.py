"""``diffalign generate --lora-scale 0,0.5,1``: the same noise at several strengths of a LoRA."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.evaluation.drawing.samples import Sample
from diffalign.export.adapters import set_strength
from diffalign.media.images import decode, read_file
from diffalign.models.loaded import LoadedModel
from diffalign.utils.files import open_atomic

CELL = 256  # pixels of a picture's side in the grid, at most
ROWS = 12  # prompts in the grid


def read_scales(text: str) -> list[float]:
    """Return the numbers of ``0,0.5,1``, each once.

    Raises:
        UserError: one of them is no finite number.
    """
    try:
        scales = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        scales = []
    if not scales or any(not abs(scale) <= 100 for scale in scales):
        raise UserError(f"--lora-scale {text!r}; allowed: numbers from -100 to 100 with commas: 0,0.5,1")
    return scales


def sweep(
    model: LoadedModel, scales: Sequence[float], folder: Path, draw: Callable[[Path], list[Sample]]
) -> dict[float, list[Sample]]:
    """Draw with each strength of the model's adapters, into ``folder/scale-S``; the strength is 1 afterwards.

    Args:
        draw: draws all prompts into a folder.

    Raises:
        UserError: the model has no LoRA.
    """
    drawn = {}
    try:
        for scale in scales:
            set_strength(model, scale)
            drawn[scale] = draw(folder / f"scale-{scale:g}")
    finally:
        set_strength(model, 1.0)
    return drawn


def write_grid(drawn: dict[float, list[Sample]], file: Path) -> Path:
    """Write one picture: a row for each of the first prompts, a column for each strength, named above it."""
    from PIL import Image, ImageDraw

    columns: list[list[Any]] = []
    for samples in drawn.values():
        first = [sample for sample in samples if sample.number == 0][:ROWS]
        columns.append([_picture(sample) for sample in first])
    size = columns[0][0].size
    title = 16
    grid = Image.new("RGB", (size[0] * len(columns), title + size[1] * len(columns[0])), "white")
    pen = ImageDraw.Draw(grid)
    for x, (scale, column) in enumerate(zip(drawn, columns, strict=True)):
        pen.text((x * size[0] + 4, 2), f"scale {scale:g}", fill="black")
        for y, picture in enumerate(column):
            grid.paste(picture.resize(size), (x * size[0], title + y * size[1]))
    with open_atomic(file) as out:
        grid.save(out, format="PNG")
    return file


def _picture(sample: Sample) -> Any:
    source: Any = sample.source
    picture = decode(read_file(source)) if isinstance(source, str | Path) else source
    picture = picture.convert("RGB")
    picture.thumbnail((CELL, CELL))
    return picture
