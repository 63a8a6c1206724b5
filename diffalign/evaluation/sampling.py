"""Images of a pipeline that depend on (seed, prompt, image number) alone.

The diffusers pipeline's own ``__call__`` does the sampling, one CPU ``torch.Generator`` per image: the
starting noise is the same whatever the batch size, the order of the prompts, the number of processes or the
accelerator. (The network's own arithmetic still differs in the last bits between batch sizes and machines.)

With a folder, every image is written at once and atomically under a name that says what it was made from -
prompt, seed, settings and the pipeline's weights - so an interrupted run continues, and images of other
weights are never taken for it.
"""

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.files import open_atomic, write_atomic
from diffalign.randomness import derive
from diffalign.rewards.images import to_pil


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
        """Something with ``.images``."""
        ...


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn. None leaves the pipeline's own default; what is given it must accept."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None


DEFAULTS = SamplingSettings()


@dataclass(frozen=True)
class Sample:
    """One image and what it was made from.

    Attributes:
        prompt: its prompt.
        position: place of the prompt in the list that was given.
        number: which image of the prompt; the noise depends on it, on the prompt and on the run's seed.
        seed: of its torch.Generator.
        source: the image, or the file that holds it.
    """

    prompt: str
    position: int
    number: int
    seed: int
    source: Image.Image | Path

    @property
    def image(self) -> Image.Image:
        """The image, opened if it is a file."""
        return open_image(self.source)


@dataclass(frozen=True)
class _Task:
    prompt: str
    position: int
    number: int
    seed: int
    file: str


def open_image(source: Image.Image | Path | str) -> Image.Image:
    """An RGB image from an image or a file; UserError naming a file that cannot be read."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"cannot read the image {str(source)!r}: {error}") from error


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: SamplingSettings = DEFAULTS,
    *,
    images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    folder: Path | str | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    title: str = "sampling",
    decode: Callable[[Tensor], Tensor] | None = None,
) -> list[Sample]:
    """Draw ``images_per_prompt`` images of every prompt; a prompt given twice gets further images.

    ``decode`` makes pixels (B, 3, H, W) in [0, 1] of the pipeline's latents in place of the pipeline itself,
    which does not know how to where its network has been told to answer in another precision than its VAE's.
    Process ``rank`` of ``world`` draws every world-th image and returns those. Samples come in the order of
    the prompts. Without a folder the images stay in memory.

    Raises:
        UserError: no prompts, an empty prompt, a setting that this pipeline does not take, or a folder that
            holds something else.
    """
    _check(prompts, images_per_prompt, batch_size, rank, world)
    arguments = _arguments(pipeline, settings)
    where = None if folder is None else Path(folder)
    identity = "" if where is None else json.dumps([arguments, fingerprint(pipeline)], sort_keys=True)
    tasks = _tasks(prompts, images_per_prompt, seed, identity)[rank::world]
    if where is not None:
        where.mkdir(parents=True, exist_ok=True)
        _write_manifest(where, tasks, {"seed": seed, **arguments}, rank, world)
    todo = [task for task in tasks if where is None or not (where / task.file).is_file()]
    images: dict[tuple[int, int], Image.Image] = {}
    pipeline.set_progress_bar_config(disable=True)
    bar = tqdm(
        total=len(tasks), initial=len(tasks) - len(todo), desc=title, unit="image", disable=not progress
    )
    with bar, _evaluating(pipeline):
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            for task, image in zip(batch, _draw(pipeline, batch, arguments, decode), strict=True):
                if where is None:
                    images[task.position, task.number] = image
                else:
                    save_image(image, where / task.file)
            bar.update(len(batch))
    return [
        Sample(
            t.prompt,
            t.position,
            t.number,
            t.seed,
            images[t.position, t.number] if where is None else where / t.file,
        )
        for t in tasks
    ]


def _check(prompts: Sequence[str], images_per_prompt: int, batch_size: int, rank: int, world: int) -> None:
    if isinstance(prompts, str) or not prompts:
        raise UserError(f"sampling needs a list of at least one prompt, got {prompts!r}")
    empty = [i for i, prompt in enumerate(prompts) if not prompt.strip()]
    if empty:
        raise UserError(f"prompt {empty[0]} is empty")
    for name, value in (
        ("images_per_prompt", images_per_prompt),
        ("batch_size", batch_size),
        ("world", world),
    ):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if not 0 <= rank < world:
        raise UserError(f"rank is {rank}; it must be from 0 to {world - 1}")


def _arguments(pipeline: Pipeline, settings: SamplingSettings) -> dict[str, Any]:
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    accepted = inspect.signature(pipeline.__call__).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        for name in given:
            if name not in accepted:
                allowed = [field for field in asdict(settings) if field in accepted]
                raise UserError(
                    f"sampling.{name} is {given[name]!r}, but {type(pipeline).__name__} takes no {name}; it "
                    "takes "
                    f"{', '.join(allowed) or 'none of these settings'}"
                )
    return given


def _tasks(prompts: Sequence[str], images_per_prompt: int, seed: int, identity: str) -> list[_Task]:
    seen: Counter[str] = Counter()
    tasks = []
    for position, prompt in enumerate(prompts):
        for _ in range(images_per_prompt):
            number = seen[prompt]
            seen[prompt] += 1
            own = derive(seed, prompt, number)
            name = hashlib.blake2b(f"{own}\x1f{identity}".encode(), digest_size=8).hexdigest()
            tasks.append(_Task(prompt, position, number, own, f"{name}-{number}.png"))
    return tasks


def _draw(
    pipeline: Pipeline,
    batch: list[_Task],
    arguments: Mapping[str, Any],
    decode: Callable[[Tensor], Tensor] | None,
) -> list[Image.Image]:
    arguments = dict(arguments)
    if "negative_prompt" in arguments:  # pipelines want as many as there are prompts
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(batch)
    output = pipeline(
        prompt=[task.prompt for task in batch],
        generator=[torch.Generator().manual_seed(task.seed) for task in batch],
        output_type="pil" if decode is None else "latent",
        **arguments,
    )
    return list(output.images) if decode is None else to_pil(decode(output.images))


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


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with open_atomic(path) as file:
        image.save(file, format="PNG")


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
