"""Compare models in a notebook: ``diffalign.compare(base, aligned, prompts, rewards)`` shows pictures and
scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TypeVar

from PIL import Image

from diffalign.data.prompts.prompt_sets import PromptSet, read_prompt_set
from diffalign.errors import UserError
from diffalign.evaluation.contest import BASE, Contest, contest
from diffalign.evaluation.drawing.pipeline import Pipeline
from diffalign.evaluation.drawing.sampling import DEFAULTS, SamplingSettings, generate
from diffalign.evaluation.evaluate import Evaluation, evaluate
from diffalign.evaluation.measuring.store import freed
from diffalign.evaluation.report import sections
from diffalign.evaluation.report.charts import number
from diffalign.evaluation.report.embedding import tag
from diffalign.evaluation.report.page import fragment
from diffalign.evaluation.report.standings import categories, standings
from diffalign.media.files import MediaLike
from diffalign.media.videos import Video
from diffalign.rewards import load
from diffalign.rewards.registry import parse
from diffalign.runs.load_pipeline import open_model
from diffalign.types import Reward
from diffalign.utils.devices import device_name

T = TypeVar("T")

Model = Pipeline | str | Path | Sequence[MediaLike | str]
"""A pipeline; a name of one (hub id, folder, ``tiny:sdxl``, run directory, folder of a LoRA); or existing
samples of a model: images, videos or their files.
"""


@dataclass(frozen=True)
class NotebookComparison:
    """Samples of several models for the same prompts, side by side; a notebook shows them as a grid.

    Attributes:
        base: N images or videos.
        aligned: N by model.
        prompts: N.
        contest: the evaluation: verdict, gains, categories; None without rewards. ``report.write_contest``
            makes files of it.
        shown: number of prompts in the grid, from the first on.
    """

    base: tuple[MediaLike, ...] = field(repr=False)
    aligned: Mapping[str, tuple[MediaLike, ...]] = field(repr=False)
    prompts: tuple[str, ...] = field(repr=False)
    contest: Contest | None
    shown: int = 12

    @property
    def evaluation(self) -> Evaluation | None:
        """Of the best model; None without rewards."""
        return None if self.contest is None else self.contest.leading

    def _repr_html_(self) -> str:
        """Return the report's verdict, gains, warnings and statistics around the first ``shown`` prompts."""
        cells = "".join(self._cell(i) for i in range(min(self.shown, len(self.prompts))))
        grid = f'<div class="grid">{cells}</div>'
        if self.contest is None:
            return fragment(grid)
        facts: dict[str, tuple[float | None, int | None]] = dict.fromkeys(self.contest.names, (None, None))
        parts = [
            sections.head(self.contest, ""),
            standings(self.contest),
            sections.numbers(self.contest, facts),
            sections.alarm(self.contest),
            sections.rewards(self.contest),
            grid,
            categories(self.contest),
            sections.motion(self.contest),
            sections.statistics(self.contest),
        ]
        return fragment("\n".join(part for part in parts if part))

    def _cell(self, i: int) -> str:
        images = [self._image(BASE, self.base[i], i)]
        images += [self._image(name, sources[i], i) for name, sources in self.aligned.items()]
        return (
            f'<div style="max-width:{136 * len(images) - 8}px"><div style="display:flex;gap:8px">'
            f'{"".join(images)}</div><div style="font-size:13px;margin-top:4px">'
            f"{escape(self.prompts[i])}</div></div>"
        )

    def _image(self, name: str, source: MediaLike, i: int) -> str:
        shows = tag(source, f"{name}: {self.prompts[i]}", 'style="display:block;width:128px;height:auto"')
        scores = "".join(f"<br>{escape(reward)} {number(value)}" for reward, value in self._scores(name, i))
        return f'<div style="font-size:12px;width:128px">{shows}{escape(name)}{scores}</div>'

    def _scores(self, name: str, i: int) -> list[tuple[str, float]]:
        if self.contest is None:
            return []
        if name in self.contest.names:
            results = self.contest.evaluations[name].rewards
            return [(result.name, result.aligned_scores[i]) for result in results]
        return [(result.name, result.base_scores[i]) for result in self.contest.leading.rewards]


def compare(
    base: Model,
    aligned: Model | Mapping[str, Model],
    prompts: str | Path | Sequence[str],
    rewards: str | Sequence[str] | Mapping[str, Reward] | None = None,
    *,
    limit: int | None = None,
    settings: SamplingSettings = DEFAULTS,
    images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    shown: int = 12,
    progress: bool = True,
) -> NotebookComparison:
    """Sample the same prompts from the same noise with several models, score the samples, show them side by
    side.

    Models given by name are loaded one after another and freed after sampling; images stay in memory.
    ``diffalign evaluate`` is an evaluation that can be stopped and continued.

    Args:
        base: a model; see ``Model``. Existing images: ``images_per_prompt`` for every prompt, in the order of
            the prompts.
        aligned: another, or several by name.
        prompts: prompts, or what ``diffalign evaluate --prompts`` takes: a file, ``tiny:test``, ``parti``.
        rewards: specs (``"pickscore,aesthetic_v2"`` or a list) or rewards by name; the first gives the
            verdict.
        limit: the first so many prompts only.
        settings: how images are drawn.
        images_per_prompt: K.
        seed: of the noise, and of the bootstrap.
        batch_size: drawn at once; None is 8 images or 1 video.
        device: of models and rewards that are named.
        dtype: of models that are named.
        shown: number of prompts in the grid.
        progress: show bars.

    Raises:
        UserError: an argument of another kind, a model, prompts or a reward that does not exist, or counts
            that differ; see ``evaluate``.
    """
    known = _prompt_set(prompts, limit)
    models = _by_name(aligned)
    device = str(device)
    judges = _rewards(rewards, device)
    drawing = _Drawing(known.prompts, settings, images_per_prompt, seed, batch_size, device, dtype, progress)
    under = str(base) if isinstance(base, str | Path) else None
    before = drawing.of(BASE, base, None)
    after = {name: drawing.of(name, model, under) for name, model in models.items()}
    places = [i for i in range(len(known.prompts)) for _ in range(images_per_prompt)]
    texts = [known.prompts[i] for i in places]
    for name, sources in {BASE: before, **after}.items():
        if len(sources) != len(texts):
            raise UserError(
                f"{len(sources)} images of {name}, but {len(known.prompts)} prompts of {images_per_prompt}: "
                f"there must be {len(texts)}"
            )
    found: Contest | None = None
    if judges:
        evaluations = {
            name: evaluate(before, sources, texts, judges, seed=seed, progress=progress)
            for name, sources in after.items()
        }
        axes = {axis: [values[i] for i in places] for axis, values in known.categories.items()}
        found = contest(before, after, evaluations, axes)
    aligned_by_name = {name: tuple(sources) for name, sources in after.items()}
    return NotebookComparison(tuple(before), aligned_by_name, tuple(texts), found, shown)


def _by_name(aligned: Model | Mapping[str, Model]) -> dict[str, Model]:
    models = dict(aligned) if isinstance(aligned, Mapping) else {"aligned": aligned}
    if not models or BASE in models or not all(isinstance(name, str) for name in models):
        raise UserError(
            f"aligned models are {list(models)}; allowed: one or more names, none of them {BASE!r}"
        )
    return models


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise UserError(f"{name}={value!r}; allowed: a whole number, 1 or more")


def _prompt_set(prompts: str | Path | Sequence[str], limit: int | None) -> PromptSet:
    _check_count("limit", limit)
    if isinstance(prompts, str | Path):
        return read_prompt_set(str(prompts), limit)
    texts = _listed(
        prompts, "prompts", (str,), "a file of prompts, a name such as 'parti', or a list of texts"
    )
    return PromptSet(tuple(texts)[:limit])


def _listed(values: Sequence[T], name: str, kinds: tuple[type, ...], allowed: str) -> Sequence[T]:
    """Return values that are a sequence of ``kinds``.

    Raises:
        UserError: they are not; it names the first one that is something else.
    """
    if not isinstance(values, Sequence):
        raise UserError(f"{name} is a {type(values).__name__}; allowed: {allowed}")
    for i, value in enumerate(values):
        if not isinstance(value, kinds):
            raise UserError(f"{name}[{i}] is a {type(value).__name__}; allowed: {allowed}")
    return values


def _rewards(rewards: str | Sequence[str] | Mapping[str, Reward] | None, device: str) -> dict[str, Reward]:
    if rewards is None:
        return {}
    if isinstance(rewards, Mapping):
        for name, reward in rewards.items():
            if not callable(reward):
                raise UserError(
                    f"rewards[{name!r}] is a {type(reward).__name__}; allowed: a reward, such as "
                    "rewards.load('pickscore')"
                )
        return dict(rewards)
    allowed = "names, such as 'pickscore,hpsv2_1' or a list of them, or rewards by name: {'mine': reward}"
    listed = rewards.split(",") if isinstance(rewards, str) else _listed(rewards, "rewards", (str,), allowed)
    specs = [spec.strip() for spec in listed]
    names = [parse(spec)[0].name for spec in specs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"rewards has {twice[0]!r} twice; allowed: each name once in one comparison")
    return {name: load(spec, device) for name, spec in zip(names, specs, strict=True)}


@dataclass(frozen=True)
class _Drawing:
    """The settings that models are sampled with."""

    prompts: tuple[str, ...]
    settings: SamplingSettings
    images_per_prompt: int
    seed: int
    batch_size: int | None
    device: str
    dtype: str | None
    progress: bool

    def __post_init__(self) -> None:
        if not isinstance(self.settings, SamplingSettings):
            raise UserError(
                f"settings is a {type(self.settings).__name__}; allowed: such as SamplingSettings("
                "num_inference_steps=20, guidance_scale=5.0) of diffalign.evaluation.drawing.sampling"
            )
        _check_count("images_per_prompt", self.images_per_prompt)
        _check_count("batch_size", self.batch_size)
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed!r}; allowed: a whole number, 0 to 2^63 - 1")

    def of(self, name: str, model: Model, base: str | None) -> list[MediaLike]:
        """Return the samples of a model, new or existing; ``base`` is the model under a LoRA."""
        if isinstance(model, str | Path):
            pipeline: Pipeline = open_model(str(model), base, device_name(self.device), self.dtype).pipeline
        elif isinstance(model, Pipeline):
            pipeline = model
        else:
            allowed = "a pipeline, the name of one, or a list of images, videos or files"
            samples = _listed(model, name, (Image.Image, Video, Path, str), allowed)
            return [Path(one) if isinstance(one, str) else one for one in samples]
        drawn = generate(
            pipeline,
            self.prompts,
            self.settings,
            images_per_prompt=self.images_per_prompt,
            seed=self.seed,
            batch_size=self.batch_size,
            progress=self.progress,
            title=f"sampling {name}",
        )
        del pipeline
        freed()
        return [sample.source for sample in drawn]
