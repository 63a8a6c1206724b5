"""The model card: README.md with the hub's front matter, five lines that load the model, and the numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from diffalign.models.registry import FAMILIES
from diffalign.models.sources import HUB_ID


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        base_model: what was aligned: hub id or folder.
        family: name in the registry.
        adapted: a LoRA (True) or a whole pipeline.
        method: the method's name, for the title: "Diffusion-DPO".
        title: heading; None makes one.
        license: of the base model, where known.
        numbers: results by name, as measured.
        settings: the run's configuration, a tree.
        tags: more tags for the hub.
        note: a sentence for readers, such as what the preferences were.
    """

    base_model: str
    family: str
    adapted: bool
    method: str
    title: str | None = None
    license: str | None = None
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    note: str = ""

    def text(self) -> str:
        """The README.md."""
        title = self.title or f"{FAMILIES[self.family].title} aligned with {self.method}"
        kind = "LoRA adapters for" if self.adapted else "A fine-tuned copy of"
        parts = [
            f"---\n{_yaml(self._front_matter())}---\n",
            f"# {title}\n",
            f"{kind} `{self.base_model}`, trained with {self.method} by diffalign. {self.note}".rstrip()
            + "\n",
            f"## Use\n\n```python\n{self._loading()}```\n",
        ]
        if self.numbers:
            rows = "".join(f"| {name} | {_number(value)} |\n" for name, value in self.numbers.items())
            parts.append(f"## Results\n\n| | |\n|---|---|\n{rows}")
        if self.settings:
            parts.append(f"## Settings\n\n```yaml\n{_yaml(self.settings)}```\n")
        return "\n".join(parts)

    def _front_matter(self) -> dict[str, Any]:
        tags = [
            "text-to-image",
            "diffusers",
            *(["lora"] if self.adapted else []),
            "preference-alignment",
            "diffalign",
        ]
        matter: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
        if "/" in self.base_model and HUB_ID.fullmatch(self.base_model):  # the hub refuses anything but an id
            matter["base_model"] = self.base_model
            matter["base_model_relation"] = "adapter" if self.adapted else "finetune"
        if self.license is not None:
            matter["license"] = self.license
        return matter | {"tags": list(dict.fromkeys([*tags, *self.tags]))}

    def _loading(self) -> str:
        pipeline = FAMILIES[self.family].pipeline
        source = f'"{self.base_model}"' if self.adapted else '"path/to/this/folder"'
        lines = [f"from diffusers import {pipeline}"]
        if self.adapted and self.base_model.startswith("tiny:"):
            lines.append("from diffalign.tiny import pipeline_path")
            source = f'pipeline_path("{self.base_model.removeprefix("tiny:")}")'
        lines.append(f"\npipeline = {pipeline}.from_pretrained({source})")
        if self.adapted:
            lines.append('pipeline.load_lora_weights("path/to/this/folder")')
        lines.append('image = pipeline("a lighthouse at dusk").images[0]')
        return "\n".join(lines) + "\n"


def _number(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    """Mappings and sequences as YAML knows them."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
