"""Run iterated DPO: sample with the current model, score, make pairs, align from the last round's result.

    python pipelines/iterated_rounds.py --rounds 3 --output runs/rounds

Each round's reference is the model that sampled its pairs, so preferences are about current samples. With
LoRA the adapters of a round are merged into its result, and the next round trains new ones. Without arguments
it runs on the built-in tiny SDXL with its judge; a reward for real images is ``pickscore``. After each round
it prints the gain over the base on held-out prompts with the same noise.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from diffalign.config.schema import ModelConfig
from diffalign.data import read_prompts
from diffalign.evaluation.drawing.sampling import SamplingSettings
from diffalign.evaluation.evaluate import compare_pipelines
from diffalign.export.aligned import save_merged
from diffalign.models.loading import load
from diffalign.rewards import load as load_reward
from diffalign.runs.align import align
from diffalign.runs.demo import sample_pairs
from diffalign.runs.validate import read_run
from diffalign.utils.files import write_atomic


def merged(model: ModelConfig, aligned: Path) -> ModelConfig:
    """Merge the result of a round; return the configuration of the model that the next round starts from."""
    if model.train == "full":
        return replace(model, path=str(aligned))
    folder = aligned.parent / "merged"
    save_merged(model, aligned, folder, "A round of pipelines/iterated_rounds.py, merged.\n")
    return replace(model, path=str(folder), variant=None, revision=None, vae=None)


def main() -> None:
    """Train in rounds; print and write the gain after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny_sdxl_dpo", help="a recipe of configs/ or a YAML file")
    parser.add_argument("--model", help="hub id, folder or checkpoint file")
    parser.add_argument("--train-prompts", default="tiny:train", help="a file of prompts to sample pairs for")
    parser.add_argument("--test-prompts", default="tiny:test", help="a file of held-out prompts")
    parser.add_argument("--prompts-per-round", type=int, default=1000)
    parser.add_argument("--candidates", type=int, default=4, help="images a prompt; best against worst")
    parser.add_argument("--count", type=int, default=256, help="how many held-out prompts")
    parser.add_argument("--reward", default="judge", help="who judges; see `diffalign rewards`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimizer steps a round")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--output", default="runs/rounds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    run = read_run(arguments.recipe)
    first = current = replace(run.model, path=arguments.model or run.model.path)
    sampling = SamplingSettings(arguments.sampling_steps, arguments.guidance)
    prompts, test = read_prompts(arguments.train_prompts), read_prompts(arguments.test_prompts)
    reward, rows = load_reward(arguments.reward), []
    for number in range(1, arguments.rounds + 1):
        folder = Path(arguments.output) / f"round-{number}"
        seed = arguments.seed + number
        start = (number - 1) * arguments.prompts_per_round % len(prompts)  # new prompts until all are used
        chosen = (prompts[start:] + prompts[:start])[: arguments.prompts_per_round]
        pairs = sample_pairs(
            current,
            chosen,
            folder / "pairs.parquet",
            seed,
            candidates=arguments.candidates,
            reward=arguments.reward,
            sampling=sampling,
        )
        training = replace(run.training, seed=seed, steps=arguments.steps or run.training.steps)
        data = replace(run.data, path=str(pairs), format="parquet")
        result = align(
            replace(run, output=str(folder), overwrite=True, model=current, data=data, training=training)
        )
        if result.aligned is None:
            raise SystemExit(f"interrupted in round {number}")
        current = merged(current, result.aligned)
        pipelines = load(first).pipeline, load(current).pipeline
        compared = compare_pipelines(
            *pipelines, test[: arguments.count], {arguments.reward: reward}, sampling, batch_size=32
        )
        gain = compared.evaluation.primary.comparison.gain
        rows.append({"round": number, "gain": gain.value, "low": gain.low, "high": gain.high})
        print(f"round {number}: gain {gain.value:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}")
        write_atomic(Path(arguments.output) / "rounds.json", json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
