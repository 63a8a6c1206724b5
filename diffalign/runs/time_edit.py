"""``diffalign edit`` as a function: edit a model, draw before and after, write the pipeline and the page."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.data.reading.json_files import json_rows
from diffalign.errors import UserError
from diffalign.evaluation.drawing.sampling import SamplingSettings, generate
from diffalign.evaluation.measuring.statistics import compare
from diffalign.evaluation.report.edit_page import EditGroup, edit_page
from diffalign.export.time_edits import Edited, read_edits, save_edited, undo
from diffalign.media.files import MediaLike
from diffalign.models.loaded import LoadedModel
from diffalign.models.time_edit.edit import Edit, EditSettings, Pair, edit
from diffalign.models.time_edit.projections import shared_blocks
from diffalign.types import Reward
from diffalign.utils.files import write_atomic
from diffalign.utils.text import read_text

GROUPS = {
    "edited": "Prompts that hold the source of an edit.",
    "related": "Prompts that share a word with the source of an edit, without holding it.",
    "unrelated": "Prompts that share no word with the source of an edit.",
}
LITTLE = frozenset(["a", "an", "the", "of", "in", "on", "at", "to", "and", "with", "for", "by"])
"""Words that relate no prompt to another."""

UNRELATED = ("a photo of a mountain lake at dawn", "a bowl of soup", "an old man reading", "a city street")
"""Drawn where no prompts are given, those that share no word with an edit."""


@dataclass(frozen=True)
class Drawing:
    """How before and after are drawn and judged.

    Attributes:
        prompts: the prompts; empty: made of the edits, and ``UNRELATED``.
        settings: of the sampler.
        images_per_prompt: of each prompt.
        seed: of the noise.
        batch_size: images at once; None: the usual.
        rewards: by name.
        shown: pairs of images of each group in the page.
    """

    prompts: tuple[str, ...] = ()
    settings: SamplingSettings = SamplingSettings()
    images_per_prompt: int = 1
    seed: int = 0
    batch_size: int | None = None
    rewards: Mapping[str, Reward] | None = None
    shown: int = 24


@dataclass(frozen=True)
class Outcome:
    """What came of an edit: what it changed, and the groups of drawn prompts, none without a page."""

    edit: Edit
    groups: tuple[EditGroup, ...]


def edit_model(
    model: LoadedModel,
    pairs: Sequence[Pair],
    settings: EditSettings,
    output: Path,
    *,
    drawing: Drawing | None = None,
    size: tuple[int, int] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Edit the model in place and write it to ``output``, its edits of before recorded too.

    Args:
        model: the model; its ``source`` is the folder whose record of edits is carried on.
        pairs: source and destination prompts.
        settings: of the edit.
        output: the pipeline's new folder.
        drawing: of the page ``output/edit.html`` and of ``edit.json`` beside it; None: neither.
        size: (height, width) of the states that inputs are recorded at.
        say: gets a line at each stage.

    Raises:
        UserError: a model that cannot be edited, or a folder that cannot be written.
    """
    earlier = read_edits(Path(model.source).expanduser())
    groups = sort_prompts(drawing.prompts or own_prompts(pairs), pairs) if drawing else {}
    before = {name: draw(model, prompts, drawing) for name, prompts in groups.items()} if drawing else {}
    done = edit(model, pairs, settings, size)
    for line in told(model, done, pairs):
        say(line)
    facts = {
        "pairs": [asdict(pair) for pair in pairs],
        "settings": asdict(settings),
        "model": model.source,
    }
    save_edited(model, [*earlier, Edited(facts, done.before)], output)
    if drawing is None:
        return Outcome(done, ())
    found = [
        group_of(name, prompts, pairs, before[name], draw(model, prompts, drawing), drawing)
        for name, prompts in groups.items()
    ]
    title = "; ".join(f"{pair.source} → {pair.destination}" for pair in pairs[:3])
    words = [
        ("model", model.source),
        *(("edit", f"{pair.source} → {pair.destination}") for pair in pairs),
        *(("", line) for line in told(model, done, pairs)),
    ]
    write_atomic(output / "edit.html", edit_page(title, words, found, drawing.shown))
    write_atomic(output / "edit.json", json.dumps(as_json(facts, found), indent=2, ensure_ascii=False))
    return Outcome(done, tuple(found))


def undo_edits(model: LoadedModel, count: int, output: Path) -> int:
    """Take back the last ``count`` edits that the model's folder records and write it to ``output``; return
    how many are left.

    Raises:
        UserError: fewer are recorded, or the folder cannot be written.
    """
    left = undo(model, read_edits(Path(model.source).expanduser()), count)
    save_edited(model, left, output)
    return len(left)


def told(model: LoadedModel, done: Edit, pairs: Sequence[Pair]) -> list[str]:
    """Return what an edit did, in sentences."""
    layers = f"{done.values} projections to values" + (f" and {done.keys} to keys" if done.keys else "")
    lines = [
        f"{layers} edited: {done.share:.1%} of the network's parameters, moved by {done.change:.1%} of their "
        "length on average"
    ]
    for pair, matched in zip(pairs, done.matched, strict=True):
        words = ", ".join(f"{a} → {b}" for a, b in matched[:8])
        lines.append(
            f"{pair.source!r}: aligned tokens that differ: {words}"
            if matched
            else f"{pair.source!r}: every token has an equal one in {pair.destination!r}"
        )
    if shared := shared_blocks(model.network):
        lines.append(
            f"{shared} blocks project image and text by one matrix and are left as they are: the edit "
            "reaches the others only"
        )
    return lines


def read_pairs(path: str) -> list[Pair]:
    """Return the edits of a file with the columns or fields ``from`` and ``to``: csv, tsv, json, jsonl.

    Raises:
        UserError: not such a file.
    """
    pairs, file = [], Path(path).expanduser()
    tables = {".csv": ",", ".tsv": "\t"}
    if file.suffix.lower() in tables:
        table = csv.DictReader(io.StringIO(read_text(file)), delimiter=tables[file.suffix.lower()])
        rows: Iterable[tuple[str, Mapping[str, Any]]] = (
            (f"{path}, line {table.line_num}", row) for row in table
        )
    else:
        rows = json_rows(file)
    for where, row in rows:
        values = [row.get(name) for name in ("from", "to")]
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{where}: fields {', '.join(row)}; an edit has `from` and `to`, both text")
        pairs.append(Pair(*map(str, values)))
    if not pairs:
        raise UserError(f"{path}: no edits in it")
    return pairs


def sort_prompts(prompts: Sequence[str], pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """Return prompts by group of ``GROUPS``, groups without prompts left out.

    A pair of equal prompts changes nothing and counts for nothing here.
    """
    changing = [pair for pair in pairs if pair.source != pair.destination]
    known = {word for pair in changing for word in _words(pair.source)} - LITTLE
    found: dict[str, list[str]] = {name: [] for name in GROUPS}
    for prompt in prompts:
        if any(_holds(prompt, pair.source) for pair in changing):
            found["edited"].append(prompt)
        else:
            found["related" if known & set(_words(prompt)) else "unrelated"].append(prompt)
    return {name: some for name, some in found.items() if some}


def own_prompts(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return prompts to draw where none are given: sources, destinations, words of the sources, others."""
    sources = [pair.source for pair in pairs]
    words = [w for source in sources for w in _words(source) if w not in LITTLE]
    related = [f"a photo of {word}" for word in words] if len(words) > len(sources) else []
    known = set(words)
    others = [text for text in UNRELATED if not known & set(_words(text))]
    scenes = [f"a painting of {source}" for source in sources]
    destinations = [pair.destination for pair in pairs]
    return tuple(dict.fromkeys([*sources, *scenes, *destinations, *related, *others]))


def meaning(prompt: str, pairs: Sequence[Pair]) -> str:
    """Return a prompt with the sources of the edits in it replaced by their destinations."""
    for pair in pairs:
        plain = pair.destination.replace("\\", r"\\")
        prompt = re.sub(_pattern(pair.source), plain, prompt, flags=re.IGNORECASE)
    return prompt


def draw(model: LoadedModel, prompts: Sequence[str], drawing: Drawing) -> list[MediaLike]:
    """Return the images of the prompts, those of a prompt side by side."""
    samples = generate(
        model.pipeline,
        prompts,
        drawing.settings,
        images_per_prompt=drawing.images_per_prompt,
        seed=drawing.seed,
        batch_size=drawing.batch_size,
    )
    return [sample.source for sample in samples]


def group_of(
    name: str,
    prompts: Sequence[str],
    pairs: Sequence[Pair],
    before: Sequence[MediaLike],
    after: Sequence[MediaLike],
    drawing: Drawing,
) -> EditGroup:
    """Return the measured group of drawn prompts."""
    each = [prompt for prompt in prompts for _ in range(drawing.images_per_prompt)]
    meant = [meaning(prompt, pairs) if name == "edited" else prompt for prompt in each]
    moved = [np.abs(_pixels(a) - _pixels(b)).mean() for a, b in zip(before, after, strict=True)]
    rewards = {}
    for title, reward in (drawing.rewards or {}).items():
        first, second = (reward(list(images), meant).tolist() for images in (before, after))
        rewards[title] = compare(first, second, each)
    return EditGroup(
        name, GROUPS[name], tuple(each), tuple(meant), tuple(before), tuple(after), float(np.mean(moved)),
        rewards,
    )  # fmt: skip


def as_json(facts: Mapping[str, Any], groups: Sequence[EditGroup]) -> dict[str, Any]:
    """Return what ``edit.json`` holds."""
    return {
        **facts,
        "groups": [
            {
                "name": group.name,
                "prompts": list(dict.fromkeys(group.prompts)),
                "images": len(group.prompts),
                "moved": group.moved,
                "rewards": {
                    name: {
                        "before": c.base,
                        "after": c.aligned,
                        "gain": [c.gain.value, c.gain.low, c.gain.high],
                    }
                    for name, c in group.rewards.items()
                },
            }
            for group in groups
        ],
    }  # fmt: skip


def _pixels(image: Any) -> Any:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _pattern(source: str) -> str:
    return rf"(?<!\w){re.escape(source)}(?!\w)"


def _holds(prompt: str, source: str) -> bool:
    return re.search(_pattern(source), prompt, flags=re.IGNORECASE) is not None
