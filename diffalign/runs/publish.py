"""``diffalign push`` and ``--export.push_to_hub``: a run's ``aligned/`` on the hub, with its card."""

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from diffalign.errors import UserError
from diffalign.evaluation.drawing.samples import read_samples
from diffalign.export.card import Card
from diffalign.export.hub import base_license, check_repo, push_folder
from diffalign.methods import REGISTRY
from diffalign.models.experts import changing, lora_folders
from diffalign.models.starting import expanded, is_checkpoint
from diffalign.runs.exporting import exportable, figures, paper_of, versions

PICTURES = 4  # of the last validation or of the evaluation, shown on the model's page


def push(
    spec: str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    base: str | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Upload a run's result: weights, model card with figures, base and licence, and pictures.

    Args:
        spec: a run directory, an ``aligned/`` folder or a LoRA.
        license: of the base; None: what the base's card on the hub says.

    Returns:
        The model's address.

    Raises:
        UserError: nothing to push, or the hub refuses it or cannot be reached.
    """
    check_repo(repo)
    found = exportable(spec, base)
    if is_checkpoint(found.source):
        raise UserError(
            f"{spec!r} is a checkpoint, which diffusers does not load; allowed: the folder that `diffalign "
            f"export {shlex.quote(spec)} --to diffusers` writes (of all weights: --to merged)"
        )
    adapted = not (found.source / "model_index.json").is_file()
    base_config = expanded(found.base)
    license = license or base_license(found.base.path)
    if license is None:
        say(f"the licence of {found.base.path} is not known: the card names none; --license gives it")
    with tempfile.TemporaryDirectory(prefix="diffalign-push-") as temporary:
        folder = Path(temporary, "model")
        _link(found.source, folder)
        pictures = _pictures(found.folder, folder / "images")
        card = Card(
            base_model=base_config.path,
            started=changing(base_config.adapter, base_config.expert),
            experts=tuple(part.name for part in lora_folders(found.source).values()),
            family=found.family,
            adapted=adapted,
            method=REGISTRY[found.run.method["type"]].title if found.run else "preference alignment",
            license=license,
            paper=paper_of(found.run),
            versions=versions(found.folder),
            numbers=figures(found.folder),
            settings=asdict(found.run) if found.run else {},
            widget=tuple((prompt, f"images/{name}") for prompt, name in pictures),
        )
        (folder / "README.md").unlink(missing_ok=True)
        (folder / "README.md").write_text(card.text(), encoding="utf-8")
        say(f"pushing {found.source} to {repo}, with {len(pictures)} pictures")
        return push_folder(folder, repo, private, revision, f"{card.method} by diffalign")


def _link(source: Path, folder: Path) -> None:
    """Link the files of the model under another root; copy them where the disk cannot link."""

    def place(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copyfile(old, new)

    if source.is_file():
        folder.mkdir()
        place(str(source), str(folder / "pytorch_lora_weights.safetensors"))
    else:
        shutil.copytree(source, folder, copy_function=place)


def _pictures(run: Path, into: Path) -> list[tuple[str, str]]:
    """Return prompts and file names of images, one a prompt: the last validation's, else the evaluation's."""
    steps = sorted(
        folder for folder in (run / "samples").glob("step-*") if re.fullmatch(r"step-\d+", folder.name)
    )
    evaluated = run / "images" / "aligned"
    if not steps and not evaluated.is_dir():
        return []
    try:
        samples = read_samples(steps[-1] if steps else evaluated)
    except UserError:
        return []
    chosen: list[tuple[str, str]] = []
    for sample in samples:
        file = Path(str(sample.source))
        if sample.number == 0 and file.is_file() and len(chosen) < PICTURES:
            into.mkdir(parents=True, exist_ok=True)
            name = f"{len(chosen)}{file.suffix}"
            shutil.copyfile(file, into / name)
            chosen.append((sample.prompt, name))
    return chosen
