"""Align an SDXL with preference pairs, then measure the gain on held-out prompts.

    python pipelines/align_sdxl.py --data pairs.parquet --prompts prompts.txt --output runs/mine

This is ``diffalign train`` followed by ``diffalign evaluate``, written with the public API: copy and adapt
it. Without arguments it runs on the built-in tiny SDXL. A reward for real images is ``pickscore``.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from diffalign.config.schema import Run
from diffalign.data import read_prompts
from diffalign.evaluation.drawing.sampling import SamplingSettings
from diffalign.evaluation.evaluate import compare_pipelines
from diffalign.evaluation.report.report import RunFacts, write_report
from diffalign.export.aligned import load_aligned
from diffalign.models.loading import load
from diffalign.rewards import load as load_reward
from diffalign.runs.align import align
from diffalign.runs.validate import read_run


def settings(arguments: argparse.Namespace) -> Run:
    """Return the recipe with the arguments of the command line."""
    run = read_run(arguments.recipe)
    return replace(
        run,
        output=arguments.output,
        model=replace(run.model, path=arguments.model or run.model.path),
        data=replace(run.data, path=arguments.data or run.data.path),
        training=replace(run.training, steps=arguments.steps or run.training.steps, seed=arguments.seed),
    )


def main() -> None:
    """Align, sample both models with the same noise, score, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny_sdxl_dpo", help="a recipe of configs/ or a YAML file")
    parser.add_argument("--model", help="hub id, folder or checkpoint file")
    parser.add_argument("--data", help="parquet, folder, jsonl or hub data set of preference pairs")
    parser.add_argument("--prompts", default="tiny:test", help="a file of held-out prompts")
    parser.add_argument("--count", type=int, default=256, help="how many of the prompts")
    parser.add_argument("--rewards", default="judge,taste", help="the first gives the verdict")
    parser.add_argument("--output", default="runs/align-sdxl")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    arguments = parser.parse_args()

    run = settings(arguments)
    result = align(run)
    if result.aligned is None:
        print(f"interrupted; continue with --resume latest in {result.output}")
        return
    sampling = SamplingSettings(
        num_inference_steps=arguments.sampling_steps, guidance_scale=arguments.guidance
    )
    compared = compare_pipelines(
        load(run.model).pipeline,
        load_aligned(run.model, result.aligned),
        read_prompts(arguments.prompts)[: arguments.count],
        {name: load_reward(name) for name in arguments.rewards.split(",")},
        sampling,
        batch_size=32,
        folder=Path(run.output) / "images",
    )
    facts = RunFacts(run.method["type"], result.seconds, result.steps, settings=asdict(run))
    report = write_report(
        run.output,
        compared.evaluation,
        [sample.source for sample in compared.base],
        [sample.source for sample in compared.aligned],
        facts,
        metrics=Path(run.output) / "metrics.jsonl",
    )
    gain = compared.evaluation.primary.comparison.gain
    print(f"gain {gain.value:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}; see {report}")


if __name__ == "__main__":
    main()
