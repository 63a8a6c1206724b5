"""An evaluation from beginning to end, in one process or many, that can be stopped at any point.

Models are loaded, sampled and freed one after another, so memory is that of one model; then rewards in the
same way. Samples and scores are kept under the output folder, and the same call does only what is left: names
of images depend on their origin (``sampling``), keys of scores on image, prompt and reward
(``measuring.store``).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.data.prompts.prompt_sets import PromptSet
from diffalign.errors import UserError
from diffalign.evaluation.contest import BASE, Contest, contest
from diffalign.evaluation.drawing.pipeline import Pipeline
from diffalign.evaluation.drawing.sampling import DEFAULTS, SamplingSettings, draw, plan
from diffalign.evaluation.evaluate import judged
from diffalign.evaluation.measuring.perceptual import (
    PerceptualSettings,
    check_perceptual,
    measure_perceptual,
)
from diffalign.evaluation.measuring.store import MeasurementStore, NamedReward, chunks, freed
from diffalign.media.files import all_videos
from diffalign.rewards.prompt_checks import check_prompts
from diffalign.utils.distributed import joined


@dataclass(frozen=True)
class Entrant:
    """An aligned model: its name in the report, the name of its folder of images, and a function that loads
    it."""

    name: str
    folder: str
    open: Callable[[], Pipeline]


def evaluate_models(
    base: Callable[[], Pipeline],
    entrants: Sequence[Entrant],
    prompts: PromptSet,
    rewards: Sequence[NamedReward],
    settings: SamplingSettings = DEFAULTS,
    *,
    output: Path,
    images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    perceptual: PerceptualSettings | None = None,
) -> Contest | None:
    """Sample, score and compare; return None in every process but the first.

    Images go to ``output``/images/base and so on, scores and statistics to ``output``/measured.sqlite.
    ``perceptual`` adds FID and LPIPS, which the first process measures, again at every call.

    Raises:
        UserError: nothing to compare, see ``sampling.generate``, ``MeasurementStore.fill``, or
            ``measure_perceptual``.
    """
    if not entrants or not rewards:
        raise UserError("nothing to evaluate: give at least one aligned model and one reward")
    store = output / "measured.sqlite"
    if not rank:
        _loadable([] if store.exists() else rewards, perceptual, prompts.prompts, images_per_prompt)
    files: dict[str, list[Path]] = {}
    with joined(world) as wait:
        for name, folder, opened in [(BASE, BASE, base), *((e.name, e.folder, e.open) for e in entrants)]:
            pipeline = opened()
            planned = plan(
                pipeline,
                prompts.prompts,
                settings,
                images_per_prompt=images_per_prompt,
                seed=seed,
                folder=output / "images" / folder,
            )
            if perceptual is not None and perceptual.real is not None and planned.call.fps is not None:
                raise UserError(f"--fid compares images, and {type(pipeline).__name__} draws videos")
            draw(pipeline, planned, batch_size, rank, world, progress=progress, title=f"sampling {name}")
            samples = planned.samples()
            files[name] = [sample.source for sample in samples if isinstance(sample.source, Path)]
            del pipeline
            freed()
        wait()  # chunks hold what other processes have drawn
        texts = [sample.prompt for sample in samples]
        every = {name: chunks(sources, texts) for name, sources in files.items()}
        measurements = MeasurementStore(store)
        measurements.fill(
            [chunk for some in every.values() for chunk in some][rank::world], rewards, progress
        )
        wait()
    if rank:
        return None
    measured = {name: measurements.measured(some, rewards) for name, some in every.items()}
    kind = "video" if all_videos(files[BASE]) else "image"
    aligned = {e.name: files[e.name] for e in entrants}
    looked = perceptual or PerceptualSettings()
    found = measure_perceptual(looked, files[BASE], aligned, texts, progress)
    return contest(
        files[BASE],
        aligned,
        {
            name: judged(measured[BASE], measured[name], texts, kind, seed=seed, perceptual=found[name])
            for name in aligned
        },
        {axis: [of[sample.position] for sample in samples] for axis, of in prompts.categories.items()},
    )


def _loadable(
    rewards: Sequence[NamedReward],
    perceptual: PerceptualSettings | None,
    prompts: Sequence[str],
    images_per_prompt: int,
) -> None:
    """Load and free what measures, so that what is missing is reported before hours of sampling, and so are
    prompts that a reward cannot score.
    """
    for named in rewards:
        reward = named.load()
        check_prompts(reward, prompts)
        del reward
        freed()
    if perceptual is not None:
        check_perceptual(perceptual, len(prompts) * images_per_prompt)
        freed()


def entrant_names(specs: Sequence[str]) -> list[str]:
    """Return names for models from their folders: the last part, of a run's ``aligned/`` the run's; with as
    many more parts as make them unique, and numbers if none do.
    """
    places = [Path(spec) for spec in specs]
    parts = [list(place.resolve().parts if place.exists() else place.parts) for place in places]
    parts = [p[:-1] if p[-1] == "aligned" and len(p) > 1 else p for p in parts]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]).strip("/") for p in parts]
        if len({slug(name) for name in [*names, BASE]}) == len(names) + 1:
            return names
    names, taken = [p[-1] for p in parts], {BASE}
    for i, name in enumerate(names):
        number = 1
        while slug(names[i]) in taken:
            number += 1
            names[i] = f"{name} ({number})"
        taken.add(slug(names[i]))
    return names


def slug(name: str) -> str:
    """Return a name in a form that is valid for folders."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
