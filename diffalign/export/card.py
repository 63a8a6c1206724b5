"""The model card: README.md with the hub's front matter, five lines that load the model, and the numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from diffalign.models.experts import EXPERTS, FOLDERS, INTO
from diffalign.models.families.registry import FAMILIES, get_family
from diffalign.models.lora import has_lora_loader
from diffalign.models.sources import HUB_ID, LORA_FILES, SINGLE_FILE


@dataclass(frozen=True)
class Card:
    """The contents of a model card.

    Attributes:
        base_model: what was aligned: hub id or folder.
        family: name in the registry.
        adapted: a LoRA (True) or a whole pipeline.
        method: the method's name, for the title: "Diffusion-DPO".
        title: heading; None makes one.
        license: of the base model, where known.
        paper: authors, title, year and address of the method's paper; empty without a method.
        versions: of Python and of the packages that trained it, by name.
        numbers: results by name, as measured.
        settings: the run's configuration, a tree.
        tags: more tags for the hub.
        note: a sentence for readers, such as what the preferences were.
        widget: prompts and the files of their pictures in the repository, shown on the hub's page.
        started: LoRAs that were folded into the base before training (``model.adapter``).
        absent: components that the pipeline is loaded without; diffusers needs them as None.
        experts: folders of a LoRA of two experts, those that it changes.
    """

    base_model: str
    family: str
    adapted: bool
    method: str
    title: str | None = None
    license: str | None = None
    paper: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    note: str = ""
    started: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    widget: tuple[tuple[str, str], ...] = ()
    experts: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the text of README.md."""
        title = self.title or f"{FAMILIES[self.family].title} aligned with {self.method}"
        kind = "LoRA adapters for" if self.adapted else "A fine-tuned copy of"
        parts = [
            f"---\n{_yaml(self._front_matter())}---\n",
            f"# {title}\n",
            f"{kind} `{self.base_model}`, trained with {self.method} by diffalign. {self.note}".rstrip()
            + "\n",
            *([_started(self.started)] if self.adapted and self.started else []),
            *([_of_experts(self.experts)] if self.adapted and self.experts else []),
            "\n".join(["## Use\n\n```python", *self.loading(), "```\n"]),
        ]
        if self.numbers:
            rows = "".join(f"| {name} | {_number(value)} |\n" for name, value in self.numbers.items())
            parts.append(f"## Results\n\n| | |\n|---|---|\n{rows}")
        if self.versions:
            made = ", ".join(f"{name} {number}" for name, number in self.versions.items())
            parts.append(f"## Versions\n\n{made}\n")
        if self.paper:
            parts.append(f"## Citation\n\nThe method is that of {self.paper}. The software is diffalign.\n")
        if self.settings:
            parts.append(f"## Settings\n\n```yaml\n{_yaml(self.settings)}```\n")
        return "\n".join(parts)

    def _front_matter(self) -> dict[str, Any]:
        given = "image" if FAMILIES[self.family].source == "needed" else "text"
        task = f"{given}-to-video" if self._video else f"{given}-to-image"
        tags = [
            task,
            "diffusers",
            *(["lora"] if self.adapted else []),
            "preference-alignment",
            "diffalign",
        ]
        matter: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task}
        if "/" in self.base_model and HUB_ID.fullmatch(self.base_model):  # the hub accepts only an id
            matter["base_model"] = self.base_model
            matter["base_model_relation"] = "adapter" if self.adapted else "finetune"
        if self.license is not None:
            matter["license"] = self.license
        if self.widget:
            matter["widget"] = [{"text": prompt, "output": {"url": url}} for prompt, url in self.widget]
        return matter | {"tags": list(dict.fromkeys([*tags, *self.tags]))}

    def loading(self, folder: str = "path/to/this/folder") -> list[str]:
        """Return the lines of Python that load ``folder`` with plain diffusers, and generate with it."""
        family, pipeline = get_family(self.family), FAMILIES[self.family].pipeline
        by_peft = self.adapted and not has_lora_loader(family)
        source = f'"{self.base_model}"' if self.adapted else f'"{folder}"'
        lines = [f"from diffusers import {pipeline}"]
        if self.adapted and self.base_model.startswith("tiny:"):
            lines.append("from diffalign.tiny import pipeline_path")
            source = f'pipeline_path("{self.base_model.removeprefix("tiny:")}")'
        if by_peft:
            lines.append("from peft import PeftModel")
        given = [source, *(f"{name}=None" for name in self.absent)]
        motion = self.settings.get("model", {}).get("motion_adapter")
        if self.adapted and motion is not None:
            lines.append("from diffusers import MotionAdapter")
            given.append(f'motion_adapter=MotionAdapter.from_pretrained("{motion}")')
        dtype = self._dtype()
        if dtype:
            lines.insert(0, "import torch")
            given.append(f"torch_dtype={dtype}")
        single = self.adapted and self.base_model.endswith(SINGLE_FILE)
        how = "from_single_file" if single else "from_pretrained"
        lines += ["", f"pipeline = {pipeline}.{how}({', '.join(given)})"]
        if by_peft:
            lines.append(f'PeftModel.from_pretrained(pipeline.{family.network_name}, "{folder}")')
        elif self.adapted:
            lines += [
                f'pipeline.load_lora_weights("{folder}"{arguments})'
                for arguments in _loader_arguments(self.experts)
            ]
        result = "video = pipeline({}).frames[0]" if self._video else "image = pipeline({}).images[0]"
        call = '"a lighthouse at dusk"'
        if FAMILIES[self.family].source == "needed":
            lines.insert(lines.index(""), "from diffusers.utils import load_image")
            call = f'image=load_image("source.png"), prompt={call}'
        return [*lines, result.format(call)]

    def _dtype(self) -> str:
        """Return the dtype that the base model was trained in, as diffusers takes it; empty for float32."""
        name = self.settings.get("model", {}).get("dtype", "float32")
        if name == "float32":
            return ""
        if get_family(self.family).codec.exact:
            return f'{{"default": torch.{name}, "vae": torch.float32}}'
        return f"torch.{name}"

    @property
    def _video(self) -> bool:
        return get_family(self.family).codec.video


def _started(adapters: tuple[str, ...]) -> str:
    """Return the sentence on LoRAs under the trained one: without them the base and this LoRA are another
    model."""
    names = ", ".join(f"`{name}`" for name in adapters)
    return (
        f"It was trained on the base with {names} folded in: load that first, at strength 1, then this LoRA "
        "on top. `diffalign export` writes both as one (any `--to`).\n"
    )


def _of_experts(folders: tuple[str, ...]) -> str:
    """Return the sentence on which of two experts are changed, and which is not."""
    words = {FOLDERS[part]: f"{noise} noise (`{part}`)" for noise, part in EXPERTS.items()}
    changed = " and ".join(f"that for {words[name]}" for name in folders)
    rest = "" if len(folders) == len(words) else " The other one is the base's."
    return f"The base is two experts; these adapters change {changed}.{rest}\n"


def _loader_arguments(folders: tuple[str, ...]) -> list[str]:
    """Return the further arguments of each call of diffusers' loader."""
    into = {FOLDERS[part]: "".join(f", {k}={v}" for k, v in INTO[part].items()) for part in FOLDERS}
    name = f'weight_name="{LORA_FILES[0]}"'
    return [f', subfolder="{folder}", {name}{into[folder]}' for folder in folders] or [""]


def _number(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    """Return mappings and sequences as the dicts and lists of YAML."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
