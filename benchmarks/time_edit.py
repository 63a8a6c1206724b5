"""Measure TIME on the tiny SDXL: the edit of "red circle" to "blue circle", and its side effects.

    python -m benchmarks.time_edit

Templates of the edit are train captions that contain "red circle" once, with a placeholder for it. Train
captions with neither red nor circle are preserved by pairs of equal prompts. Test captions are sampled before
and after the edit from the same noise: those that contain "red circle" once (judged by the caption with "blue
circle" instead), others with red or circle, and captions with neither. The base's images of the destination
captions, from the same noise, are the reachable optimum. Writes ``benchmarks/time_edit.json``,
``time_edit.md`` and the figure ``docs/time_edit.png``.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.record import over_seeds, shown
from diffalign import tiny
from diffalign.config.schema import ModelConfig
from diffalign.evaluation.drawing.sampling import generate
from diffalign.evaluation.measuring.statistics import Comparison, compare
from diffalign.evaluation.report.grids import grid_image
from diffalign.evaluation.report.report import package_versions
from diffalign.models.loading import load
from diffalign.models.time_edit.edit import EditSettings, Pair, edit
from diffalign.runs.demo import SAMPLING
from diffalign.runs.time_edit import meaning, sort_prompts
from diffalign.tiny.judge import judge, look
from diffalign.utils.files import open_atomic, write_atomic

HERE = Path(__file__).parent
PAIR = Pair("red circle", "blue circle")
COUNTS = {"edited": 2, "related": 1, "unrelated": 1}  # images of a caption
Score = Callable[[Any, str], float]


def sees(color: str) -> Score:
    """Return a score that is 1 if the image has a circle of that colour, else 0."""
    return lambda image, prompt: float(any(t.color == color and t.shape == "circle" for t in look(image)))


SCORES: dict[str, Score] = {"judge": judge, "blue circle": sees("blue"), "red circle": sees("red")}


def main(argv: Sequence[str] | None = None) -> None:
    """Edit the model, sample, score, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--templates", type=int, default=64)
    parser.add_argument("--held", type=int, default=1024, help="train captions that are held as they are")
    parser.add_argument("--strength", type=float, default=0.1)
    parser.add_argument("--captions", type=int, default=256, help="of the unrelated; half of it related")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "time_edit.png")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = load(ModelConfig("tiny:sdxl"))
    settings = EditSettings(arguments.strength, templates=templates(arguments.templates))
    groups = sort_prompts(tiny.prompts("test"), [PAIR])
    limits = {"edited": None, "related": arguments.captions // 2, "unrelated": arguments.captions}
    prompts = {
        name: [text for text in some if text.count(PAIR.source) <= 1][: limits[name]]
        for name, some in groups.items()
    }
    pictures = lambda: {name: draw(model.pipeline, some, COUNTS[name]) for name, some in prompts.items()}  # noqa: E731
    reached = destinations(model.pipeline, prompts["edited"])
    before = pictures()
    start = time.process_time()
    done = edit(model, [PAIR, *held(arguments.held)], settings)
    seconds = time.process_time() - start
    after = pictures()
    rows = {name: scored(name, prompts[name], before[name], after[name]) for name in prompts}
    record = {
        "command": "python -m benchmarks.time_edit",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "edit": {"from": PAIR.source, "to": PAIR.destination, "lambda": settings.strength},
        "templates": len(settings.templates),
        "held": arguments.held,
        "seconds": round(seconds, 2),
        "projections": {"keys": done.keys, "values": done.values},
        "share": done.share,
        "change": done.change,
        "reachable": {
            name: mean(score, reached, targets(prompts["edited"])) for name, score in SCORES.items()
        },
        "groups": {
            name: {"captions": len(prompts[name]), "images": COUNTS[name] * len(prompts[name])}
            | {score: as_list(c) for score, c in row.items()}
            for name, row in rows.items()
        },
        "unrelated before": interval(prompts["unrelated"], before["unrelated"]),
        "versions": package_versions(),
    }
    write_atomic(arguments.output / "time_edit.json", json.dumps(record, indent=2) + "\n")
    write_atomic(arguments.output / "time_edit.md", text(record))
    with open_atomic(arguments.figure) as file:
        figure(prompts, before, after).save(file, format="PNG")
    print(text(record))


def templates(count: int) -> tuple[str, ...]:
    """Return train captions with a placeholder for the edited prompt."""
    texts = [text for text in tiny.prompts("train") if text.count(PAIR.source) == 1]
    return tuple(text.replace(PAIR.source, "{}") for text in texts[:count])


def held(count: int) -> list[Pair]:
    """Return pairs of equal train captions, which the edit preserves."""
    texts = sort_prompts(tiny.prompts("train"), [PAIR])["unrelated"]
    return [Pair(text, text) for text in texts[:count]]


def targets(prompts: Sequence[str]) -> list[str]:
    """Return the caption that each image of an edited caption should show."""
    return [meaning(text, [PAIR]) for text in prompts for _ in range(COUNTS["edited"])]


def draw(pipeline: Any, prompts: Sequence[str], count: int) -> list[Image.Image]:
    """Return ``count`` images of each prompt, contiguous by prompt."""
    samples = generate(pipeline, prompts, SAMPLING, images_per_prompt=count, batch_size=64, progress=False)
    return [sample.image for sample in samples]


def destinations(pipeline: Any, prompts: Sequence[str]) -> list[Image.Image]:
    """Return the base's images of the destination captions."""
    return draw(pipeline, [meaning(text, [PAIR]) for text in prompts], COUNTS["edited"])


def mean(score: Score, images: Sequence[Any], texts: Sequence[str]) -> float:
    """Return the mean of a score."""
    return sum(score(i, t) for i, t in zip(images, texts, strict=True)) / len(images)


def scored(
    name: str, prompts: Sequence[str], before: Sequence[Any], after: Sequence[Any]
) -> dict[str, Comparison]:
    """Return the comparison of after with before, for every score."""
    each = [text for text in prompts for _ in range(COUNTS[name])]
    meant = targets(prompts) if name == "edited" else each
    return {
        title: compare(
            *([score(i, t) for i, t in zip(images, meant, strict=True)] for images in (before, after)), each
        )
        for title, score in SCORES.items()
    }


def interval(prompts: Sequence[str], images: Sequence[Any]) -> list[float]:
    """Return the ends of the interval of the judge of an image of each prompt."""
    judged = over_seeds([[judge(image, text) for image, text in zip(images, prompts, strict=True)]])
    return [round(judged.low, 4), round(judged.high, 4)]


def as_list(c: Comparison) -> list[float]:
    """Return before, after, gain and its interval."""
    return [round(v, 4) for v in (c.base, c.aligned, c.gain.value, c.gain.low, c.gain.high)]


def text(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    edit_of, reach = record["edit"], record["reachable"]
    lines = [
        "# TIME on the tiny SDXL",
        "",
        f"`{record['command']}`: {edit_of['from']!r} becomes {edit_of['to']!r} by a closed-form edit of "
        f"{record['projections']['values']} projections to values and {record['projections']['keys']} to "
        f"keys ({record['share']:.1%} of the network), lambda {edit_of['lambda']:g}, {record['templates']} "
        f"train captions as templates, {record['held']} others held as they are, "
        f"{record['seconds']:.1f} s of one core with the templates' encoding. "
        "Images before and after are of held-out captions from the same noise, 20 steps, guidance 1; the "
        "judge reads edited captions with the destination in place of the source. The base's own images of "
        f"the destination captions reach a judge of {reach['judge']:.3f}, with a blue circle in "
        f"{reach['blue circle']:.0%} and a red one in {reach['red circle']:.0%}. Intervals are 95 %, by a "
        "bootstrap over captions.",
        "",
        "| captions | images | score | before | after | difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in record["groups"].items():
        for score in SCORES:
            base, aligned, *gain = row[score]
            counts = f"{name} ({row['captions']})", str(row["images"])
            cells = [*counts, score, f"{base:.3f}", f"{aligned:.3f}", shown(gain)]
            lines.append(f"| {' | '.join(cells)} |")
    others = record["groups"]["unrelated"]
    after, (low, high) = others["judge"][1], record["unrelated before"]
    lines += [
        "",
        f"Of unrelated captions the judge before the edit has the interval [{low:.3f}, {high:.3f}] over "
        f"captions; after it, {after:.3f} lies {'within' if low <= after <= high else 'outside'} it.",
        "",
        "Edited captions hold *red circle*; related ones *red* or *circle* without the other beside it; "
        "unrelated ones neither. A causal text encoder reads *red* before it knows of what, so that an edit "
        "of *red circle* moves *red* of other shapes too: the related captions pay for it.",
        "",
        "`docs/time_edit.png` shows images before and after.",
        "",
        f"{record['machine']}, torch {record['versions']['torch']}, {record['date']}.",
    ]
    return "\n".join(lines) + "\n"


def figure(prompts: Any, before: Any, after: Any) -> Image.Image:
    """Return nine pairs of images: six of edited captions, three of unrelated ones."""
    picked = [("edited", i) for i in range(6)] + [("unrelated", i) for i in range(3)]
    sides = [[images[n][i * COUNTS[n]] for n, i in picked] for images in (before, after)]
    return grid_image(*sides, [prompts[n][i] for n, i in picked], side=128, titles=("before", "after"))


if __name__ == "__main__":
    main()
