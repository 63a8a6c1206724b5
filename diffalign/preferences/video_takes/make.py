"""Write pairs of takes to disk, two videos and one JSON line each, in any number of processes, resumably.

A pair depends only on (seed, clip's name, number). File names hold a digest of clip, prompt, settings and the
model's weights, so that an interrupted run continues and files of other settings are not reused. One clip is
in memory at a time, and one of its takes on the accelerator.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffalign.config.schema import DataConfig
from diffalign.data.encoding.geometry import clips as clip_cuts
from diffalign.data.encoding.geometry import cuts
from diffalign.data.encoding.images import cut_clip, cut_out, image_size, to_unit
from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.randomness import derive
from diffalign.errors import UserError
from diffalign.evaluation.drawing.pipeline import fingerprint
from diffalign.media.files import save_image
from diffalign.media.images import UNREADABLE, decode, why_unreadable
from diffalign.media.videos import Video, need_av, probe, write_video
from diffalign.models.loaded import LoadedModel
from diffalign.preferences.video_takes.clips import Clip
from diffalign.preferences.video_takes.guided import denoised, even_times, model_times, noised
from diffalign.types import Cond, Denoiser
from diffalign.utils.files import write_atomic

PAIRS = "pairs.jsonl"
_ENCODED = 32  # prompts that are encoded each time the text encoders are moved to the accelerator


@dataclass(frozen=True)
class PairSettings:
    """Settings of the pairs.

    Attributes:
        height: height in pixels, of a size that the model supports.
        width: width in pixels, of a size that the model supports.
        frames: largest number of frames of a video; fewer if the clip is shorter or the model supports only
            some numbers. None: all of the clip.
        fps: frames a second of clips as read and of videos as written; None: each clip's own rate.
        eta: range of the noise level in (0, 1], from which one level is drawn for each pair; (1, 1) makes two
            independent samples of the caption.
        steps: N, number of steps of the sampler from noise; a take uses round(eta N) of them.
        guidance: scale of classifier-free guidance; 1 disables it.
        grid: "even": times k / N, as published; "model": the model's own, with its timestep shift; "auto":
            even if eta is below 1, else the model's. Variance-preserving models always use their own.
        seed: seed of eta and noise.
        pairs: number of pairs of each clip.
    """

    height: int
    width: int
    frames: int | None = None
    fps: float | None = None
    eta: tuple[float, float] = (0.65, 0.8)
    steps: int = 40
    guidance: float = 8.0
    grid: Literal["auto", "even", "model"] = "auto"
    seed: int = 0
    pairs: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.eta[0] <= self.eta[1] <= 1:
            raise UserError(f"eta {self.eta[0]} to {self.eta[1]}; allowed: 0 < low <= high <= 1")
        for name in ("height", "width", "steps", "pairs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: at least 1")

    def eta_of(self, clip: Clip, number: int) -> float:
        """Draw eta from U[low, high), one value for both takes of a pair."""
        low, high = self.eta
        return low + (high - low) * derive(self.seed, "eta", clip.name, number) / 2**63


@dataclass(frozen=True)
class PairCounts:
    """The result of a process.

    Attributes:
        pairs: number of its pairs that exist, those of earlier runs included.
        unreadable: name and reason of each unreadable clip.
        path: file of JSON lines of all pairs.
    """

    pairs: int
    unreadable: tuple[str, ...]
    path: Path


@dataclass(frozen=True)
class _Task:
    clip: Clip
    number: int
    files: tuple[Path, Path]

    @property
    def done(self) -> bool:
        return all(file.is_file() for file in self.files)


def make_pairs(
    model: LoadedModel,
    clips: Sequence[Clip],
    settings: PairSettings,
    folder: Path | str,
    *,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> PairCounts:
    """Write the takes of each clip, and ``pairs.jsonl`` without labels.

    Rows of ``pairs.jsonl`` have ``prompt``, ``videos`` or ``images``, ``made_from`` and ``eta``.

    Args:
        model: the model.
        clips: the clips.
        settings: the settings.
        folder: output folder.
        rank: number of this process, which makes the pairs rank, rank + world, ...
        world: number of processes.
        progress: whether to show a progress bar.

    Raises:
        UserError: a size that the model does not support, settings that it does not read, no readable clip
            (checked in a single process only), or PyAV is not installed for a video model.
    """
    if model.codec.video:
        need_av()
    elif settings.frames is not None or settings.fps is not None:
        raise UserError(
            f"frames={settings.frames}, fps={settings.fps} with {model.family.name}, a model of images; "
            "allowed: neither"
        )
    if settings.grid == "even" and model.target != "flow":
        raise UserError(
            f"grid='even' with {model.family.name}, a variance-preserving model, whose own grid is used; "
            "allowed: auto, model"
        )
    model.latent_shape(settings.height, settings.width)  # refuses a wrong size before any work
    output = Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    tasks = _tasks(model, clips, settings, output)
    own = tasks[rank::world]
    todo = [task for task in own if not task.done]
    unreadable: list[str] = []
    bar = tqdm(total=len(own), initial=len(own) - len(todo), desc="pairs", unit="pair", disable=not progress)
    with bar:
        for task, cond, negative in _encoded(model, todo, settings):
            try:
                pixels, fps = read_pixels(task.clip.path, model, settings)
            except (*UNREADABLE, UserError) as error:
                unreadable.append(f"{task.clip.name}: {why_unreadable(error)}")
                continue
            for file, take in zip(
                task.files, takes(model, pixels, cond, negative, task, settings), strict=True
            ):
                _save(take, fps, file)
            bar.update()
    _list(tasks, settings, output / PAIRS)
    done = sum(task.done for task in own)
    if unreadable and not done and world == 1:
        raise UserError(f"no pair was made of {len(clips)} clips; the first: {unreadable[0]}")
    return PairCounts(done, tuple(dict.fromkeys(unreadable)), output / PAIRS)


def takes(
    model: LoadedModel, pixels: Tensor, cond: Cond, negative: Cond, task: _Task, settings: PairSettings
) -> Iterator[Tensor]:
    """Yield the pixels of both takes in [0, 1], (1, 3, F, H, W) or (1, 3, H, W)."""
    model.move_encoders(model.device, ("vae",))
    clean = model.encode_pixels(pixels)[0].to(model.device)
    eta = settings.eta_of(task.clip, task.number)
    times = times_of(model, settings, eta, tuple(clean.shape[1:]))
    denoiser: Denoiser = model.sampler()
    if settings.guidance != 1:
        denoiser = Guided(denoiser, negative, settings.guidance)
    for member in (0, 1):
        seed = derive(settings.seed, "noise", task.clip.name, task.number, member)
        eps = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
        start = eps if eta == 1 else noised(denoiser, clean, eps, times)
        yield model.decode(denoised(denoiser, start, times, cond))


def times_of(model: LoadedModel, settings: PairSettings, eta: float, shape: tuple[int, ...]) -> Tensor:
    """Return the times (n + 1,) along which noised latents of this shape are denoised."""
    even = settings.grid == "even" or (settings.grid == "auto" and eta < 1)
    if even and model.target == "flow":
        return even_times(eta, settings.steps)
    return model_times(eta, settings.steps, lambda steps: model.grid(steps, shape))


def read_pixels(path: Path, model: LoadedModel, settings: PairSettings) -> tuple[Tensor, float]:
    """Read a clip at the size and rate of the settings.

    Returns:
        Pixels (1, 3, F, H, W) or (1, 3, H, W) in [-1, 1], and frames a second (0 for an image).

    Raises:
        one of ``UNREADABLE``, or UserError: the file is no image or video, or too short.
    """
    config = DataConfig(
        height=settings.height, width=settings.width, frames=settings.frames, fps=settings.fps
    )
    content = path.read_bytes()
    if not model.codec.video:
        (cut,) = cuts([image_size(content)], config, "")
        return to_unit(cut_out(decode(content), cut))[None], 0.0
    vae = model.pipeline.vae.config
    cut_of_clip = clip_cuts([probe(content)], config, "", lambda n: model.codec.usable_frames(vae, n))
    if cut_of_clip is None:
        raise UserError(f"{path}: too short for a frame")
    return to_unit(cut_clip(content, cut_of_clip[0]))[None], cut_of_clip[0].fps


def _encoded(
    model: LoadedModel, tasks: Sequence[_Task], settings: PairSettings
) -> Iterator[tuple[_Task, Cond, Cond]]:
    """Yield each task with its conditions and the negative conditions of guidance.

    Text encoders are on the accelerator only while they encode a block of prompts.
    """
    size = torch.tensor([[float(settings.height), float(settings.width)]])
    sizes = model.micro_conditions(size, torch.zeros(1, 2), size)
    for start in range(0, len(tasks), _ENCODED):
        block = tasks[start : start + _ENCODED]
        model.move_encoders(model.device, model.text_encoders)
        texts = [model.encode_prompts([task.clip.prompt]) for task in block]
        negative = model.negative(1)
        model.move_encoders("cpu", model.text_encoders)

        def on_device(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.to(model.device) for name, value in rows.items()}

        for task, text in zip(block, texts, strict=True):
            yield task, on_device({**text, **sizes}), on_device(negative)


def _tasks(model: LoadedModel, clips: Sequence[Clip], settings: PairSettings, folder: Path) -> list[_Task]:
    values = {name: value for name, value in asdict(settings).items() if name != "pairs"}
    identity = json.dumps([values, fingerprint(model.pipeline)], sort_keys=True)
    suffix = ".mp4" if model.codec.video else ".png"
    tasks = []
    for clip in clips:
        for number in range(settings.pairs):
            key = "\x1f".join((identity, clip.name, clip.prompt, str(number)))
            name = f"{clip.path.stem}-{blake2b(key.encode(), digest_size=6).hexdigest()}"
            tasks.append(_Task(clip, number, (folder / f"{name}-0{suffix}", folder / f"{name}-1{suffix}")))
    return tasks


def _save(take: Tensor, fps: float, file: Path) -> None:
    pixels = (take[0] * 255).round().to(torch.uint8).cpu()
    if file.suffix == ".png":
        save_image(Image.fromarray(pixels.permute(1, 2, 0).numpy()), file)
    else:
        write_video(Video(pixels.transpose(0, 1), fps), file)


def _list(tasks: Sequence[_Task], settings: PairSettings, path: Path) -> None:
    """Write the rows of all existing pairs; repeat if other processes have finished more in the meantime."""
    listed = -1
    while listed < (now := sum(task.done for task in tasks)):
        rows = [_row(task, settings) for task in tasks if task.done]
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        listed = now


def _row(task: _Task, settings: PairSettings) -> dict[str, Any]:
    videos = task.files[0].suffix == ".mp4"
    return {
        "prompt": task.clip.prompt,
        "videos" if videos else "images": [file.name for file in task.files],
        "made_from": str(task.clip.path),
        "eta": round(settings.eta_of(task.clip, task.number), 4),
    }
