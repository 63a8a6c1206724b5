"""Align with human preferences in rounds (D3PO): sample a round, ask a person for the best, train, repeat.

    python pipelines/human_rounds.py --rounds 4 --output runs/people

Images are written as files. For each prompt the script asks in the terminal which image is the best, and
writes the answers to the round's ``labels.jsonl``. After an interruption it resumes. With ``--labeller
judge`` a reward answers. Other flags are those of ``diffalign train``: ``--rollout.prompts_per_round 8``. At
the end it prints the gain over the base on held-out prompts under a reward (``pickscore`` for real images).
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.config.schema import CheckpointConfig, Run
from diffalign.data import read_prompts
from diffalign.evaluation.drawing.sampling import SamplingSettings
from diffalign.evaluation.evaluate import compare_pipelines
from diffalign.export.aligned import load_aligned
from diffalign.models.loading import load
from diffalign.rewards import load as load_reward
from diffalign.runs.align import align
from diffalign.runs.rollouts import plan_of, steps_of_a_round
from diffalign.runs.validate import read_run
from diffalign.utils.files import write_atomic


def settings(recipe: str, flags: Sequence[str], rounds: int) -> Run:
    """Return the recipe with human judges; each round's reference is the model that sampled it."""
    run = read_run(recipe, ["--rollout.prompts_per_round=8", "--output=runs/people", *flags])
    size = math.gcd(run.training.batch_size, run.rollout.prompts_per_round)
    training = replace(run.training, batch_size=size)
    run = replace(run, training=training, rollout=replace(run.rollout, by="people", rewards=()))
    steps = steps_of_a_round(run, plan_of(run, load(run.model)))
    training = replace(training, steps=steps * rounds, reference_every=steps)
    resume = "latest" if any(Path(run.output, "checkpoints").glob("step-*")) else None
    return replace(run, training=training, checkpoint=CheckpointConfig(every=steps), resume=resume)


def ask_person(line: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Ask in the terminal for the best of one prompt's images; return the label."""
    files = [f"{number}  {folder / name}" for number, name in enumerate(line["images"])]
    print("", line["prompt"], *files, sep="\n  ")
    while True:
        answer = input("the best one (Enter: no difference): ").strip()
        if answer in map(str, range(len(line["images"]))):
            return {"best": int(answer)}
        if not answer:
            return {"scores": [0] * len(line["images"])}


def label(output: str, answer: Callable[[dict[str, Any], Path], dict[str, Any]]) -> None:
    """Fill in the missing labels of the newest round; every answer is written at once."""
    file = max(Path(output, "rollouts").glob("round-*")) / "labels.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    for number, line in enumerate(lines):
        if line.get("best") is None and None in line["scores"]:
            lines[number] = line | answer(line, file.parent)
            write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines))


def main() -> None:
    """Train in rounds, then print the gain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny_sdxl_d3po", help="a recipe of configs/ or a YAML file")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--labeller", choices=("terminal", "judge"), default="terminal")
    parser.add_argument("--reward", default="judge", help="whose gain is told; answers for --labeller judge")
    parser.add_argument("--prompts", default="tiny:test", help="a file of held-out prompts")
    parser.add_argument("--count", type=int, default=64, help="how many of them")
    arguments, flags = parser.parse_known_args()
    reward = load_reward(arguments.reward)

    def ask_reward(line: dict[str, Any], folder: Path) -> dict[str, Any]:
        images = [Image.open(folder / name) for name in line["images"]]
        return {"scores": reward(images, [line["prompt"]] * len(images)).tolist()}

    run = settings(arguments.recipe, flags, arguments.rounds)
    result = align(run)
    while result.waiting:
        label(run.output, ask_reward if arguments.labeller == "judge" else ask_person)
        result = align(replace(run, resume="latest"))
    if result.aligned is None:
        raise SystemExit(f"interrupted after step {result.steps}; call it again to go on")
    pipelines = load(run.model).pipeline, load_aligned(run.model, result.aligned)
    sampling = SamplingSettings(run.rollout.steps, run.rollout.guidance)
    test = read_prompts(arguments.prompts)[: arguments.count]
    compared = compare_pipelines(*pipelines, test, {arguments.reward: reward}, sampling, batch_size=32)
    gain = compared.evaluation.primary.comparison.gain
    print(f"gain {gain.value:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}; see {result.aligned}")


if __name__ == "__main__":
    main()
