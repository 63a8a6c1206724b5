"""Edited pipelines on the disk: a folder that plain diffusers loads, and what undoes its edits.

``time_edits/edits.json`` lists the edits in their order, each with the prompts and settings that made it, and
``time_edits/N.safetensors`` holds the weights that edit N replaced, as they were: putting them back in the
reverse order gives every earlier model, to the bit. diffusers reads neither.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.models.loaded import LoadedModel
from diffalign.models.time_edit.edit import restore
from diffalign.utils.files import atomic_folder
from diffalign.utils.text import read_json

FOLDER = "time_edits"


@dataclass(frozen=True)
class Edited:
    """An edit of a pipeline.

    Attributes:
        facts: prompts and settings, as JSON holds them.
        before: the weights that it replaced, by parameter.
    """

    facts: Mapping[str, Any]
    before: Mapping[str, Tensor] = field(repr=False)


def read_edits(folder: Path) -> list[Edited]:
    """Return the edits that a pipeline's folder records, the first one first; none where it has no record.

    Raises:
        UserError: the record is damaged.
    """
    record = folder / FOLDER / "edits.json"
    if not record.is_file():
        return []
    listed = read_json(record)
    if not isinstance(listed, list) or not all(isinstance(facts, dict) for facts in listed):
        raise UserError(f"{record} is no list of edits; allowed: what `diffalign edit` has written")
    found = []
    for number, facts in enumerate(listed):
        file = record.parent / f"{number}.safetensors"
        try:
            found.append(Edited(facts, load_file(file)))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}), so the edit cannot be undone") from error
    return found


def save_edited(model: LoadedModel, edits: Sequence[Edited], folder: Path) -> None:
    """Write the pipeline with the record of its edits; what stood in ``folder`` is replaced when all is
    written.

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic_folder(folder) as temporary:
        model.pipeline.save_pretrained(temporary)
        if edits:
            (temporary / FOLDER).mkdir()
            facts = [dict(edit.facts) for edit in edits]
            (temporary / FOLDER / "edits.json").write_text(
                json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8"
            )
        for number, edit in enumerate(edits):
            weights = {name: weight.detach().cpu().contiguous() for name, weight in edit.before.items()}
            save_file(weights, temporary / FOLDER / f"{number}.safetensors")


def undo(model: LoadedModel, edits: Sequence[Edited], count: int) -> list[Edited]:
    """Take the last ``count`` edits back, in place; return those that are left.

    Raises:
        UserError: there are fewer.
    """
    if not 1 <= count <= len(edits):
        raise UserError(f"--undo {count}: {model.source!r} records {len(edits)} edits; allowed: 1 to that")
    for edit in reversed(edits[len(edits) - count :]):
        restore(model.network, edit.before)
    return list(edits[: len(edits) - count])
