"""Generated images and videos, and manifests with the origin of each."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.errors import UserError
from diffalign.media.files import Media, open_media
from diffalign.media.videos import Video
from diffalign.utils.files import write_atomic
from diffalign.utils.text import json_lines


@dataclass(frozen=True)
class Sample:
    """One image or video with its prompt and seed.

    Attributes:
        prompt: its prompt.
        position: place of the prompt in the list that was given.
        number: of the image among those of the prompt; the noise depends on it, the prompt and the run's
            seed.
        seed: of its torch.Generator.
        source: the image or video, or the file that holds it.
    """

    prompt: str
    position: int
    number: int
    seed: int
    source: Media | Path

    @property
    def media(self) -> Media:
        """The image or video, opened if it is a file."""
        return open_media(self.source)

    @property
    def image(self) -> Image.Image:
        """The image, opened if it is a file; UserError if this is a video."""
        media = self.media
        if isinstance(media, Video):
            raise UserError(f"the sample of {self.prompt!r} is a video, not an image")
        return media


def write_manifest(folder: Path, rows: Iterable[Mapping[str, Any]], rank: int, world: int) -> None:
    """Write the manifest of a folder: the share of process ``rank`` of ``world``."""
    name = "manifest.jsonl" if world == 1 else f"manifest-{rank}-of-{world}.jsonl"
    if rank == 0:  # manifests of another number of processes list the same images
        for old in folder.glob("manifest*.jsonl"):
            if old.name != name and not old.name.endswith(f"-of-{world}.jsonl"):
                old.unlink(missing_ok=True)
    write_atomic(folder / name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def read_samples(folder: Path | str) -> list[Sample]:
    """Return the existing samples of a folder's manifests, in the order of the prompts.

    Raises:
        UserError: no manifest, or an unreadable line in one.
    """
    folder = Path(folder)
    manifests = sorted(folder.glob("manifest*.jsonl"))
    if not manifests:
        raise UserError(f"{str(folder)!r} has no manifest.jsonl; it was not made by sampling")
    samples = []
    for manifest in manifests:
        for where, row in json_lines(manifest):
            try:
                sample = Sample(
                    row["prompt"], row["position"], row["number"], row["seed"], folder / row["file"]
                )
            except (KeyError, TypeError) as error:
                raise UserError(f"{where} is not a sample: {error}") from error
            samples.append(sample)
    samples.sort(key=lambda s: (s.position, s.number))
    return [sample for sample in samples if isinstance(sample.source, Path) and sample.source.is_file()]
