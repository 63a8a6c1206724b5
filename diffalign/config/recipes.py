"""Read the metadata of shipped recipes: title, model family, method, and the notes in the file's header."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.config.files import read_yaml, shipped_configs

_LABEL = re.compile(r"([A-Z][A-Za-z]*(?: and [a-z]+)?): ")


@dataclass(frozen=True)
class Recipe:
    """A shipped recipe.

    Attributes:
        name: name of the recipe, for ``train``.
        title: first sentence of its header.
        family: name of its model family.
        method: name of its method.
        notes: other paragraphs of its header by their label, such as Source, GPUs, Time, Data and
            Differences.
        commands: command lines in its header.
    """

    name: str
    title: str
    family: str
    method: str
    notes: Mapping[str, str]
    commands: tuple[str, ...]

    @property
    def gpus(self) -> str:
        """Number and memory of the GPUs that it needs, as text; "" if its header names none."""
        text = next((text for label, text in self.notes.items() if label.startswith("GPUs")), "")
        return re.split(r"[:;,(]|\.(?: |$)| as ", text)[0].strip()

    @property
    def size(self) -> tuple[int, int]:
        """Number of GPUs and GB of each, as a sort key; recipes without a number come last."""
        number = re.match(r"one|any|\d+", self.gpus)
        if number is None:
            return 10**6, 0
        memory = re.search(r"(\d+) GB", self.gpus)
        return int(number[0]) if number[0].isdigit() else 1, int(memory[1]) if memory else 0


def recipes() -> list[Recipe]:
    """Return the shipped recipes of ``train``, by name."""
    return [read_recipe(path) for path in shipped_configs().values()]


def read_recipe(path: Path) -> Recipe:
    """Return the metadata of a recipe's file."""
    data = read_yaml(path)
    title, notes, commands = header(path.read_text("utf-8"))
    model: Mapping[str, Any] = data.get("model", {})
    source = str(model.get("path", ""))
    family = model.get("family") or source.removeprefix("tiny:")
    return Recipe(path.stem, title, str(family), str(data["method"]["type"]), notes, commands)


def header(text: str) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """Return title, notes by label and command lines of the comment at the start of a file."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        words = line[1:]
        if not words.strip():
            paragraphs.append([])
        else:
            paragraphs[-1].append(words)
    title = " ".join(line.strip() for line in paragraphs[0])
    notes, commands = dict[str, str](), list[str]()
    for paragraph in paragraphs[1:]:
        if all(line.startswith("   ") for line in paragraph):
            commands += [line.strip() for line in paragraph]
            continue
        label = ""
        for line in paragraph:
            match = None if line.startswith("  ") else _LABEL.match(line.strip())
            if match:
                label = match[1]
                notes[label] = line.strip()[match.end() :]
            elif label:
                notes[label] += " " + line.strip()
    return title, notes, tuple(commands)
