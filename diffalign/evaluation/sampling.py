"""Images or videos of a pipeline that depend on (seed, prompt, number) alone.

The diffusers pipeline's own ``__call__`` does the sampling, one CPU ``torch.Generator`` per image: the
starting noise is the same whatever the batch size, the order of the prompts, the number of processes or the
accelerator. (The network's own arithmetic still differs in the last bits between batch sizes and machines.)

With a folder, every image (PNG) or video (mp4) is written at once and atomically under a name that says what
it was made from - prompt, seed, settings and the pipeline's weights - so an interrupted run continues, and
images of other weights are never taken for it.
"""

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.evaluation.media import Media, open_media, save_media
from diffalign.files import write_atomic
from diffalign.randomness import derive
from diffalign.videos import Video, need_av

FPS = 16.0  # frames a second of videos, where neither settings nor pipeline say


@runtime_checkable
class Pipeline(Protocol):
    """What is used of a diffusers pipeline."""

    @property
    def components(self) -> dict[str, Any]:
        """Networks, scheduler, tokenizers by name."""
        ...

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the pipeline's own progress bar."""
        ...

    def __call__(self, **arguments: Any) -> Any:
        """Something with ``.images``, or ``.frames`` of videos."""
        ...


@dataclass(frozen=True)
class SamplingSettings:
    """How images or videos are drawn. None leaves the pipeline's own default; what is given it must accept.

    ``fps`` is what videos are written with; a pipeline that asks for it (``frame_rate``) is told as well.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    num_frames: int | None = None
    fps: float | None = None
    max_sequence_length: int | None = None


DEFAULTS = SamplingSettings()


@dataclass(frozen=True)
class Sample:
    """One image or video and what it was made from.

    Attributes:
        prompt: its prompt.
        position: place of the prompt in the list that was given.
        number: which image of the prompt; the noise depends on it, on the prompt and on the run's seed.
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


@dataclass(frozen=True)
class _Task:
    prompt: str
    position: int
    number: int
    seed: int
    file: str


@dataclass(frozen=True)
class _Call:
    """How the pipeline is called: its arguments, and frames a second of videos; None: it gives images."""

    arguments: Mapping[str, Any]
    fps: float | None

    @property
    def kind(self) -> str:
        return "image" if self.fps is None else "video"


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: SamplingSettings = DEFAULTS,
    *,
    images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    folder: Path | str | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    title: str = "sampling",
) -> list[Sample]:
    """Draw ``images_per_prompt`` images of every prompt; a prompt given twice gets further images.

    A pipeline that takes ``num_frames`` gives videos. ``batch_size`` None is 8 images or 1 video. Process
    ``rank`` of ``world`` draws every world-th image and returns those. Samples come in the order of the
    prompts. Without a folder the images stay in memory.

    Raises:
        UserError: no prompts, an empty prompt, a setting that this pipeline does not take, or a folder that
            holds something else.
    """
    call = _call(pipeline, settings)
    size = (8 if call.fps is None else 1) if batch_size is None else batch_size
    _check(prompts, images_per_prompt, size, rank, world)
    facts = dict(call.arguments) if call.fps is None else {**call.arguments, "fps": call.fps}
    where = None if folder is None else Path(folder)
    identity = "" if where is None else json.dumps([facts, fingerprint(pipeline)], sort_keys=True)
    suffix = "png" if call.fps is None else "mp4"
    tasks = _tasks(prompts, images_per_prompt, seed, identity, suffix)[rank::world]
    if where is not None:
        if call.fps is not None:
            need_av()  # before anything is drawn
        where.mkdir(parents=True, exist_ok=True)
        _write_manifest(where, tasks, {"seed": seed, **facts}, rank, world)
    todo = [task for task in tasks if where is None or not (where / task.file).is_file()]
    drawn: dict[tuple[int, int], Media] = {}
    pipeline.set_progress_bar_config(disable=True)
    bar = tqdm(
        total=len(tasks), initial=len(tasks) - len(todo), desc=title, unit=call.kind, disable=not progress
    )
    with bar, _evaluating(pipeline):
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            for task, media in zip(batch, _draw(pipeline, batch, call), strict=True):
                if where is None:
                    drawn[task.position, task.number] = media
                else:
                    save_media(media, where / task.file)
            bar.update(len(batch))
    sources = [drawn[t.position, t.number] if where is None else where / t.file for t in tasks]
    return [Sample(t.prompt, t.position, t.number, t.seed, s) for t, s in zip(tasks, sources, strict=True)]


def _check(prompts: Sequence[str], images_per_prompt: int, batch_size: int, rank: int, world: int) -> None:
    if isinstance(prompts, str) or not prompts:
        raise UserError(f"sampling needs a list of at least one prompt, got {prompts!r}")
    empty = [i for i, prompt in enumerate(prompts) if not prompt.strip()]
    if empty:
        raise UserError(f"prompt {empty[0]} is empty")
    counts = {"images_per_prompt": images_per_prompt, "batch_size": batch_size, "world": world}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if not 0 <= rank < world:
        raise UserError(f"rank is {rank}; it must be from 0 to {world - 1}")


def _call(pipeline: Pipeline, settings: SamplingSettings) -> _Call:
    accepted = inspect.signature(pipeline.__call__).parameters
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    videos, rate = "num_frames" in accepted, accepted.get("frame_rate")
    fps = given.pop("fps", None if rate is None else rate.default) if videos else None
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        for name in given:
            if name not in accepted:
                allowed = [field for field in asdict(settings) if field in accepted]
                raise UserError(
                    f"sampling.{name} is {given[name]!r}, but {type(pipeline).__name__} takes no {name}; it "
                    f"takes {', '.join(allowed) or 'none of these settings'}"
                )
    if rate is not None and fps is not None:
        given["frame_rate"] = fps
    return _Call(given, float(fps or FPS) if videos else None)


def _tasks(
    prompts: Sequence[str], images_per_prompt: int, seed: int, identity: str, suffix: str
) -> list[_Task]:
    seen: Counter[str] = Counter()
    tasks = []
    for position, prompt in enumerate(prompts):
        for _ in range(images_per_prompt):
            number = seen[prompt]
            seen[prompt] += 1
            own = derive(seed, prompt, number)
            name = hashlib.blake2b(f"{own}\x1f{identity}".encode(), digest_size=8).hexdigest()
            tasks.append(_Task(prompt, position, number, own, f"{name}-{number}.{suffix}"))
    return tasks


def _draw(pipeline: Pipeline, batch: list[_Task], call: _Call) -> list[Media]:
    arguments = dict(call.arguments)
    if "negative_prompt" in arguments:  # pipelines want as many as there are prompts
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(batch)
    output = pipeline(
        prompt=[task.prompt for task in batch],
        generator=[torch.Generator().manual_seed(task.seed) for task in batch],
        output_type="pil" if call.fps is None else "pt",
        **arguments,
    )
    if call.fps is None:
        return list(output.images)
    pixels = (output.frames.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [Video(frames, call.fps) for frames in pixels]


def _modules(pipeline: Pipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in sorted(pipeline.components.items()) if isinstance(part, nn.Module)}


@contextmanager
def _evaluating(pipeline: Pipeline) -> Iterator[None]:
    """Networks in eval mode (LoRA dropout off) while sampling, and as they were afterwards."""
    training = [m for network in _modules(pipeline).values() for m in network.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def fingerprint(pipeline: Pipeline) -> str:
    """A short digest of weights and scheduler: equal for equal models, different after a training step.

    Of every tensor it takes name, shape, sum, sum of squares and 64 evenly spaced values, not all the bytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part, network in _modules(pipeline).items():
        for name, tensor in network.state_dict().items():
            flat = tensor.detach().flatten()
            digest.update(f"{part}.{name}{tuple(tensor.shape)}".encode())
            if flat.numel() and flat.device.type != "meta":
                sums = torch.stack(
                    [flat.sum(dtype=torch.float64), flat.float().square().sum(dtype=torch.float64)]
                )
                digest.update(sums.cpu().numpy().tobytes())
                digest.update(flat[:: max(1, flat.numel() // 64)][:64].double().cpu().numpy().tobytes())
        for name, module in network.named_modules():
            # A flag of peft's layers, a method of networks. Adapters switched off are another model.
            disabled = getattr(module, "disable_adapters", None)
            if isinstance(disabled, bool):
                digest.update(f"{name}{disabled}{module.active_adapters}{module.scaling}".encode())
    scheduler = pipeline.components.get("scheduler")
    if scheduler is not None:
        digest.update(json.dumps(dict(scheduler.config), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _write_manifest(
    folder: Path, tasks: list[_Task], facts: Mapping[str, Any], rank: int, world: int
) -> None:
    name = "manifest.jsonl" if world == 1 else f"manifest-{rank}-of-{world}.jsonl"
    rows = [{**asdict(task), "settings": dict(facts)} for task in tasks]
    write_atomic(folder / name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def read_samples(folder: Path | str) -> list[Sample]:
    """The samples that a folder's manifests list and that have been drawn, in the order of the prompts.

    Raises:
        UserError: no manifest, or an unreadable line in one.
    """
    folder = Path(folder)
    manifests = sorted(folder.glob("manifest*.jsonl"))
    if not manifests:
        raise UserError(f"{str(folder)!r} has no manifest.jsonl; it was not made by sampling")
    samples = []
    for manifest in manifests:
        for i, line in enumerate(manifest.read_text().splitlines()):
            try:
                row = json.loads(line)
                sample = Sample(
                    row["prompt"], row["position"], row["number"], row["seed"], folder / row["file"]
                )
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{manifest} line {i + 1} is not a sample: {error}") from error
            samples.append(sample)
    samples.sort(key=lambda s: (s.position, s.number))
    return [sample for sample in samples if isinstance(sample.source, Path) and sample.source.is_file()]
