"""Images or videos of a pipeline that depend on (seed, prompt, number) alone.

The diffusers pipeline's own ``__call__`` does the sampling, one CPU ``torch.Generator`` per image: the
starting noise is the same whatever the batch size, the order of the prompts, the number of processes or the
accelerator. (The network's own arithmetic still differs in the last bits between batch sizes and machines.)

With a folder, every image (PNG) or video (mp4) is written atomically as soon as it exists, under a name that
depends on prompt, seed, settings and the pipeline's weights. So an interrupted run continues with the same
batches, and images of other weights are never reused.
"""

import hashlib
import inspect
import json
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffalign.diffusion.randomness import derive
from diffalign.errors import UserError
from diffalign.evaluation.drawing.pipeline import Pipeline, check_size, fingerprint, modules
from diffalign.evaluation.drawing.samples import Sample, write_manifest
from diffalign.evaluation.drawing.sources import (
    check_sources,
    drawn_one_by_one,
    source_arguments,
    told_source,
)
from diffalign.media.files import Media, save_media
from diffalign.media.videos import Video, need_av

FPS = 16.0  # frames a second of videos, where neither settings nor pipeline have a value


@dataclass(frozen=True)
class SamplingSettings:
    """The settings of sampling. None keeps the pipeline's default; other values must be accepted by the
    pipeline.

    Videos are written with ``fps`` frames a second; it is also passed to a pipeline that takes
    ``frame_rate``.
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
class _Task:
    prompt: str
    position: int
    number: int
    seed: int
    file: str


@dataclass(frozen=True)
class _Call:
    """The call of a pipeline: its arguments, and the frames a second of its videos (None: it makes
    images)."""

    arguments: Mapping[str, Any]
    fps: float | None

    @property
    def kind(self) -> str:
        return "image" if self.fps is None else "video"

    @property
    def facts(self) -> dict[str, Any]:
        """The settings that images depend on, besides weights and noise."""
        return dict(self.arguments) | ({} if self.fps is None else {"fps": self.fps})


@dataclass(frozen=True)
class Plan:
    """The samples to make, the calls that make them, and the folder (None: they stay in memory); see
    ``plan``."""

    tasks: tuple[_Task, ...] = field(repr=False)
    call: _Call
    folder: Path | None
    seed: int

    def samples(self, drawn: Mapping[_Task, Media] | None = None) -> list[Sample]:
        """Return the samples in the order of the prompts: ``drawn`` ones in memory, or the folder's files,
        existing or not."""
        found: Mapping[_Task, Media | Path] = drawn or {}
        if self.folder is not None:
            found = {task: self.folder / task.file for task in self.tasks}
        return [Sample(t.prompt, t.position, t.number, t.seed, found[t]) for t in self.tasks if t in found]


def plan(
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: SamplingSettings = DEFAULTS,
    *,
    images_per_prompt: int = 1,
    seed: int = 0,
    folder: Path | str | None = None,
    by_position: bool = False,
) -> Plan:
    """Return the samples that ``generate`` makes in all processes; nothing is made or written yet.

    ``by_position`` names files after the prompt's place (``0003-0.png``), the same whatever the weights.

    Raises:
        UserError: no prompts, an empty prompt, a setting or a source image that this pipeline does not take,
            or none where it needs one.
    """
    call = _call(pipeline, settings)
    check_size(pipeline, settings.height, settings.width)
    _check(prompts, images_per_prompt)
    check_sources(pipeline, prompts)
    where = None if folder is None else Path(folder)
    named = where is not None and not by_position
    identity = json.dumps([call.facts, fingerprint(pipeline)], sort_keys=True) if named else ""
    suffix = "png" if call.fps is None else "mp4"
    tasks = _tasks(prompts, images_per_prompt, seed, identity, suffix)
    if by_position:
        tasks = [replace(task, file=f"{task.position:04d}-{task.number}.{suffix}") for task in tasks]
    return Plan(tuple(tasks), call, where, seed)


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
    """Generate ``images_per_prompt`` images of every prompt; a prompt given twice gets further images.

    A pipeline that takes ``num_frames`` gives videos. ``batch_size`` None is 8 images or 1 video. Process
    ``rank`` of ``world`` draws every world-th image and returns those. Samples come in the order of the
    prompts. Without a folder the images stay in memory.

    Raises:
        UserError: no prompts, an empty prompt, a setting that this pipeline does not take, or a folder that
            holds something else.
    """
    planned = plan(pipeline, prompts, settings, images_per_prompt=images_per_prompt, seed=seed, folder=folder)
    return draw(pipeline, planned, batch_size, rank, world, progress=progress, title=title)


def draw(
    pipeline: Pipeline,
    planned: Plan,
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    *,
    progress: bool = True,
    title: str = "sampling",
) -> list[Sample]:
    """Generate those samples of process ``rank`` of ``world`` that are not in the folder yet; see
    ``generate``."""
    call, where = planned.call, planned.folder
    size = (8 if call.fps is None else 1) if batch_size is None else batch_size
    one_by_one = drawn_one_by_one(pipeline, [task.prompt for task in planned.tasks])
    _check_share(size, rank, world)
    tasks = planned.tasks[rank::world]
    if where is not None:
        if call.fps is not None:
            need_av()  # raises before anything is made
        where.mkdir(parents=True, exist_ok=True)
        facts = {"seed": planned.seed, **call.facts}
        rows = [{**asdict(task), **told_source(task.prompt), "settings": facts} for task in tasks]
        write_manifest(where, rows, rank, world)
    todo = {task for task in tasks if where is None or not (where / task.file).is_file()}
    drawn: dict[_Task, Media] = {}
    pipeline.set_progress_bar_config(disable=True)
    done = len(tasks) - len(todo)
    bar = tqdm(total=len(tasks), initial=done, desc=title, unit=call.kind, disable=not progress)
    with bar, _evaluating(pipeline):
        for start in range(0, len(tasks), size):
            # The batches are those of an uninterrupted run: with others the last bits would differ.
            batch = [task for task in tasks[start : start + size] if task in todo]
            if not batch:
                continue
            for part in [[task] for task in batch] if one_by_one else [batch]:
                for task, media in zip(part, _draw(pipeline, part, call), strict=True):
                    if where is None:
                        drawn[task] = media
                    else:
                        save_media(media, where / task.file)
            bar.update(len(batch))
    return replace(planned, tasks=tasks).samples(drawn)


def _check(prompts: Sequence[str], images_per_prompt: int) -> None:
    if isinstance(prompts, str) or not prompts:
        raise UserError(f"sampling needs a list of at least one prompt, got {prompts!r}")
    empty = [i for i, prompt in enumerate(prompts) if not prompt.strip()]
    if empty:
        raise UserError(f"prompt {empty[0]} is empty")
    if images_per_prompt < 1:
        raise UserError(f"images_per_prompt is {images_per_prompt}; it must be at least 1")


def _check_share(batch_size: int, rank: int, world: int) -> None:
    for name, value in {"batch_size": batch_size, "world": world}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if not 0 <= rank < world:
        raise UserError(f"rank is {rank}; it must be from 0 to {world - 1}")


def _call(pipeline: Pipeline, settings: SamplingSettings) -> _Call:
    accepted = inspect.signature(pipeline.__call__).parameters
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    videos, rate = "num_frames" in accepted, accepted.get("frame_rate")
    own = [name for name in ("num_frames", "fps") if name in given]
    if own and not videos:
        raise UserError(
            f"sampling.{own[0]}={given[own[0]]!r} (--frames, --fps) with {type(pipeline).__name__}, which "
            "draws images; allowed: neither"
        )
    fps = given.pop("fps", None if rate is None else rate.default) if videos else None
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        for name in given:
            if name not in accepted:
                allowed = [field for field in asdict(settings) if field in accepted]
                raise UserError(
                    f"sampling.{name} is {given[name]!r}, but {type(pipeline).__name__} takes no {name}; it "
                    f"takes {', '.join(allowed) or 'none of these settings'}"
                )
    own_guidance = "true_cfg_scale" in accepted and accepted["guidance_scale"].default is None
    if own_guidance and "guidance_scale" in given:  # Qwen-Image's, classifier-free
        given["true_cfg_scale"] = given.pop("guidance_scale")
        given.setdefault("negative_prompt", "")  # without which there is none
    if "max_area" in accepted and "height" in given and "width" in given:
        # of FLUX.1 Kontext, which otherwise draws a megapixel whatever size it is told
        given |= {"max_area": given["height"] * given["width"], "_auto_resize": False}
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
            own = derive(seed, prompt, *told_source(prompt).values(), number)
            name = hashlib.blake2b(f"{own}\x1f{identity}".encode(), digest_size=8).hexdigest()
            tasks.append(_Task(prompt, position, number, own, f"{name}-{number}.{suffix}"))
    return tasks


def _draw(pipeline: Pipeline, batch: list[_Task], call: _Call) -> list[Media]:
    arguments = dict(call.arguments)
    if "negative_prompt" in arguments:  # pipelines need one for each prompt
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(batch)
    prompts = [task.prompt for task in batch]
    arguments |= source_arguments(pipeline, prompts, arguments.get("height"), arguments.get("width"))
    with _refused(pipeline):
        output = pipeline(
            prompt=[str(prompt) for prompt in prompts],
            generator=[torch.Generator().manual_seed(task.seed) for task in batch],
            output_type="pil" if call.fps is None else "pt",
            **arguments,
        )
    if call.fps is None:
        return list(output.images)
    if not bool(torch.isfinite(output.frames).all()):
        raise UserError(_not_finite(pipeline))
    pixels = (output.frames.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [Video(frames, call.fps) for frames in pixels]


@contextmanager
def _refused(pipeline: Pipeline) -> Iterator[None]:
    """Turn what a pipeline cannot draw into a UserError: settings that diffusers refuses, and images of NaN,
    which its conversion to 8 bits makes black with a warning of numpy's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        try:
            yield
        except RuntimeWarning as error:
            raise UserError(_not_finite(pipeline)) from error
        except ValueError as error:
            if [frame.name for frame in traceback.extract_tb(error.__traceback__)][-1] != "check_inputs":
                raise
            raise UserError(f"{type(pipeline).__name__} refuses these settings: {error}") from error


def _not_finite(pipeline: Pipeline) -> str:
    dtypes = {parameter.dtype for network in modules(pipeline).values() for parameter in network.parameters()}
    kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in dtypes))
    return (
        f"{type(pipeline).__name__} ({kinds}) draws pixels that are NaN, which would be saved as black: its "
        "weights are not finite, or its autoencoder overflows in float16; allowed: --dtype bfloat16 or "
        "float32, or a model whose training did not diverge"
    )


@contextmanager
def _evaluating(pipeline: Pipeline) -> Iterator[None]:
    """Put networks in eval mode (LoRA dropout off) inside the context, and restore their mode."""
    training = [m for network in modules(pipeline).values() for m in network.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
