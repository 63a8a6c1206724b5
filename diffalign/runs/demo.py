"""The demo: align the embedded tiny SDXL with Diffusion-DPO and measure the gain on held-out prompts.

Everything is real and small: a genuine ``StableDiffusionXLPipeline``, 32-pixel drawn scenes, a judge that
reads pixels, a second judge (taste) and a learned reward (a tiny CLIP of PickScore's format) that are not
trained on.
"""

import io
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffalign import tiny
from diffalign.config.schema import ModelConfig, Run
from diffalign.errors import UserError
from diffalign.evaluation.drawing.sampling import SamplingSettings, generate
from diffalign.evaluation.evaluate import PipelineComparison, compare_pipelines
from diffalign.evaluation.report.grids import grid_image
from diffalign.evaluation.report.report import RunFacts, report_data, write_report
from diffalign.export.aligned import load_aligned
from diffalign.export.programs import trained_lora
from diffalign.media.files import save_image
from diffalign.models.families.registry import FAMILIES
from diffalign.models.loading import load
from diffalign.rewards import load as load_reward
from diffalign.runs.align import Result, align
from diffalign.runs.validate import read_run
from diffalign.tiny.worlds import SCENES, WORLDS
from diffalign.utils.files import open_atomic

REWARDS = SCENES.measures.rewards
# Without guidance: it shows the model itself, at half the cost.
SAMPLING = SamplingSettings(num_inference_steps=20, guidance_scale=1.0)
EVALUATION_SEED = 0  # the same noise for every run, so that reports compare
_PRINTED = 6  # pairs in the picture


@dataclass(frozen=True)
class DemoOptions:
    """The options of the demo.

    Attributes:
        output: the run directory.
        recipe: name of a tiny recipe under ``configs/``.
        seed: of the training.
        steps: optimizer steps; None: the recipe's.
        prompts: held-out prompts to evaluate on.
        sampled: train on pairs that the base model samples and the judge ranks, instead of the shipped ones.
        flip_labels: flip every label: the control that must get worse.
    """

    output: str = "runs/demo"
    recipe: str = "tiny_sdxl_dpo"
    seed: int = 0
    steps: int | None = None
    prompts: int = 512
    sampled: bool = False
    flip_labels: bool = False


def demo(
    options: DemoOptions = DemoOptions(),
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, Any]:
    """Align, evaluate and write the report; return the contents of ``report.json``.

    Raises:
        UserError: an option out of range.
    """
    run = _run(options)
    measured = WORLDS[run.model.path.removeprefix("tiny:")].measures
    held_out = measured.prompts("test", options.prompts)
    if options.sampled:
        say("sampling 4 images for each of 1000 training prompts; the judge picks the best and the worst")
        path = sample_pairs(
            run.model,
            measured.prompts("train", 1000),
            Path(options.output) / "pairs.parquet",
            options.seed,
            reward=measured.rewards[0],
        )
        run = replace(run, data=replace(run.data, path=str(path)))
    result = align(run, say)
    if result.aligned is None:
        raise KeyboardInterrupt
    say(f"held-out pairs: {result.verdict}")
    compared = compare_pipelines(
        load(run.model).pipeline,
        load_aligned(run.model, result.aligned),
        held_out,
        {name: load_reward(name) for name in measured.rewards},
        SAMPLING,
        seed=EVALUATION_SEED,
        batch_size=64,
        folder=result.output / "images",
    )
    title = f"tiny {run.model.path.removeprefix('tiny:')} aligned with {run.method['type']}"
    facts = RunFacts(
        method=run.method["type"],
        train_seconds=result.seconds,
        steps=result.steps,
        settings=asdict(run) | {"sampling": asdict(SAMPLING)},
        title=title + (", labels flipped" if options.flip_labels else ""),
        usage=_usage(run, result),
    )
    _write(result.output, compared, facts)
    return report_data(compared.evaluation, facts)


def _usage(run: Run, result: Result) -> tuple[str, ...]:
    """Return how diffusers loads the result, and how other programs do after an export."""
    family = tiny.FAMILIES[run.model.path.removeprefix("tiny:")]
    lines = list(result.loading)
    if run.model.train == "lora" and FAMILIES[family].files.layout == "kohya" and result.aligned is not None:
        lines += ["", *trained_lora(result.output, family)]
    return (
        *lines,
        "",
        f"diffalign export {shlex.quote(str(result.output))} --to merged   # or kohya, comfyui, single-file",
    )


def _run(options: DemoOptions) -> Run:
    run = read_run(options.recipe)
    if not run.model.path.startswith("tiny:"):
        raise UserError(
            f"recipe {options.recipe!r} trains {run.model.path!r}; allowed in the demo: the tiny recipes"
        )
    if run.model.path.removeprefix("tiny:") not in WORLDS:
        raise UserError(
            f"recipe {options.recipe!r} trains {run.model.path!r}, a model of videos; allowed in the demo: "
            "tiny recipes of images; `diffalign train` and `diffalign evaluate` take videos"
        )
    steps = run.training.steps if options.steps is None else options.steps
    return replace(
        run,
        output=options.output,
        overwrite=True,
        training=replace(run.training, seed=options.seed, steps=steps),
        data=replace(run.data, flip_labels=1.0 if options.flip_labels else run.data.flip_labels),
    )


def _write(output: Path, compared: PipelineComparison, facts: RunFacts) -> None:
    base, aligned = ([s.source for s in side] for side in (compared.base, compared.aligned))
    write_report(output, compared.evaluation, base, aligned, facts, metrics=output / "metrics.jsonl")
    scores = compared.evaluation.primary
    gains = [after - before for before, after in zip(scores.base_scores, scores.aligned_scores, strict=True)]
    # Not the best ones: every step-th of the pairs that differ, in the order of the prompts.
    changed = [i for i, gain in enumerate(gains) if gain] or list(range(len(gains)))
    shown = changed[:: max(1, len(changed) // _PRINTED)][:_PRINTED]
    picture = grid_image(
        [base[i] for i in shown],
        [aligned[i] for i in shown],
        [compared.evaluation.prompts[i] for i in shown],
        base_scores=[scores.base_scores[i] for i in shown],
        aligned_scores=[scores.aligned_scores[i] for i in shown],
    )
    save_image(picture, output / "comparison.png")


def sample_pairs(
    model: ModelConfig,
    prompts: list[str],
    path: Path,
    seed: int,
    *,
    candidates: int = 4,
    reward: str = "judge",
    sampling: SamplingSettings = SAMPLING,
) -> Path:
    """Write pairs that a model samples and a reward ranks, best against worst, as parquet in Pick-a-Pic's
    schema.

    A prompt whose images all score the same gives a tie.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = generate(
        load(model).pipeline,
        prompts,
        sampling,
        images_per_prompt=candidates,
        seed=seed + 1,  # not the noise of the evaluation
        batch_size=64,
        title="sampling pairs",
    )
    images = [s.image for s in samples]
    scores = load_reward(reward)(images, [s.prompt for s in samples]).reshape(-1, candidates)
    rows = []
    for index, prompt in enumerate(prompts):
        best, worst = int(scores[index].argmax()), int(scores[index].argmin())
        if best == worst:
            best, worst = 0, 1
        first = 1.0 if scores[index, best] > scores[index, worst] else 0.5
        jpgs = [_encoded(images[index * candidates + i]) for i in (best, worst)]
        rows.append(
            {
                "caption": prompt,
                "jpg_0": jpgs[0],
                "jpg_1": jpgs[1],
                "label_0": first,
                "label_1": 1 - first,
                "has_label": True,
            }
        )
    with open_atomic(path) as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return path


def _encoded(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
