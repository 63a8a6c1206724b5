"""What a shipped recipe says of itself: title, model family, method, and the notes of its file."""

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
        name: as ``train`` takes it.
        title: the first sentence of its file.
        family: name of its model family.
        method: name of its method.
        notes: the other paragraphs by their label, such as Source, GPUs, Time, Data and Differences.
        commands: how its file says that it is run, a line an entry.
    """

    name: str
    title: str
    family: str
    method: str
    notes: Mapping[str, str]
    commands: tuple[str, ...]

    @property
    def gpus(self) -> str:
        """Number and memory of the GPUs that it is for; "" where its file names none."""
        text = next((text for label, text in self.notes.items() if label.startswith("GPUs")), "")
        return re.split(r"[:;,(]|\.(?: |$)| as ", text)[0].strip()

    @property
    def size(self) -> tuple[int, int]:
        """Number of the GPUs and GB of each, to sort by; those that a file leaves open come last."""
        number = re.match(r"one|any|\d+", self.gpus)
        if number is None:
            return 10**6, 0
        memory = re.search(r"(\d+) GB", self.gpus)
        return int(number[0]) if number[0].isdigit() else 1, int(memory[1]) if memory else 0


def recipes() -> list[Recipe]:
    """Return the shipped recipes of ``train``, by name."""
    return [read_recipe(path) for path in shipped_configs().values()]


def read_recipe(path: Path) -> Recipe:
    """Return what a recipe's file says."""
    data = read_yaml(path)
    title, notes, commands = header(path.read_text("utf-8"))
    model: Mapping[str, Any] = data.get("model", {})
    source = str(model.get("path", ""))
    family = model.get("family") or source.removeprefix("tiny:")
    return Recipe(path.stem, title, str(family), str(data["method"]["type"]), notes, commands)


def header(text: str) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """Return title, notes by label and command lines of the comment that a file begins with."""
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
            found = None if line.startswith("  ") else _LABEL.match(line.strip())
            if found:
                label = found[1]
                notes[label] = line.strip()[found.end() :]
            elif label:
                notes[label] += " " + line.strip()
    return title, notes, tuple(commands)
