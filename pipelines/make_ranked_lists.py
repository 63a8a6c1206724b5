"""Make ranked lists for RankDPO: images of several generators or seeds, scored by several rewards.

    python pipelines/make_ranked_lists.py --generators base-sdxl,images/sd3 --rewards pickscore,clip
    diffalign train sdxl_rankdpo --data.path runs/syn-pic/lists.jsonl

This is the data path of RankDPO, "Syn-Pic" (Karthik et al. 2024, arXiv 2410.18013). An image's score is its
share of won comparisons, wins / (n (k - 1)) over n rewards and k - 1 rivals of the same prompt; a strictly
greater reward wins, so rewards need no common scale. A generator is a model, or an output folder of
``diffalign generate`` for the same prompts (for several GPUs, or models of other libraries). Existing images
and scores are reused. Without arguments it uses four seeds of the built-in tiny SDXL.
"""

import argparse
import json
import os
from pathlib import Path

from diffalign.config.schema import ModelConfig
from diffalign.data import read_prompts
from diffalign.data.encoding.rating import wins
from diffalign.errors import UserError
from diffalign.evaluation.drawing.samples import Sample, read_samples
from diffalign.evaluation.drawing.sampling import SamplingSettings, generate
from diffalign.models.loading import load
from diffalign.rewards.scoring.cache import ScoreCache
from diffalign.rewards.scoring.items import Item
from diffalign.rewards.scoring.score import make_scorers, score_column
from diffalign.utils.files import write_atomic


def images_of(generator: str, prompts: list[str], arguments: argparse.Namespace) -> list[Sample]:
    """Return a generator's images, ``arguments.images`` of every prompt, sampling them if it is a model."""
    if list(Path(generator).glob("manifest*.jsonl")):
        return read_samples(generator)
    return generate(
        load(ModelConfig(path=generator, dtype=arguments.dtype), arguments.device).pipeline,
        prompts,
        SamplingSettings(arguments.sampling_steps, arguments.guidance),
        images_per_prompt=arguments.images,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        folder=Path(arguments.output) / "images" / generator.strip("/.").replace("/", "_").replace(":", "_"),
        title=f"sampling {generator}",
    )


def main() -> None:
    """Sample, score and rank images, and write the lists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generators", default="tiny:sdxl", help="models or folders of images, by commas")
    parser.add_argument("--images", type=int, default=4, help="of each model and prompt, a seed each")
    parser.add_argument("--prompts", default="tiny:train", help="a file of prompts")
    parser.add_argument("--count", type=int, help="how many of the prompts")
    parser.add_argument("--rewards", default="judge,taste", help="by commas; see `diffalign rewards`")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", default="runs/syn-pic")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    prompts = list(dict.fromkeys(read_prompts(arguments.prompts)))[: arguments.count]
    members: dict[str, list[tuple[str, Path]]] = {prompt: [] for prompt in prompts}
    for generator in arguments.generators.split(","):
        for sample in images_of(generator, prompts, arguments):
            if sample.prompt in members and isinstance(sample.source, Path):
                members[sample.prompt].append((generator, sample.source))
    alone = next((prompt for prompt, images in members.items() if len(images) < 2), None)
    if alone is not None:
        raise UserError(f"{alone!r} has {len(members[alone])} images; allowed: at least 2 to rank")

    output = Path(arguments.output)
    scorers = make_scorers(arguments.rewards.split(","), arguments.device, arguments.dtype)
    cache = ScoreCache(output / "scores.sqlite")
    chunks = [prompts[i : i + arguments.batch_size] for i in range(0, len(prompts), arguments.batch_size)]
    rows = []
    for chunk in chunks:
        items = [
            Item(prompt, file, (("file", str(file)),)) for prompt in chunk for _, file in members[prompt]
        ]
        columns = [score_column(items, scorer, cache) for scorer in scorers]
        scored = iter(zip(*columns, strict=True))
        for prompt in chunk:
            rewards = tuple(next(scored) for _ in members[prompt])
            row = {
                "prompt": prompt,
                "images": [os.path.relpath(file, output) for _, file in members[prompt]],
                "scores": wins(rewards),
                "rewards": rewards,
                "generators": [generator for generator, _ in members[prompt]],
            }
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(output / "lists.jsonl", "".join(rows))
    print(f"{len(rows)} lists, {sum(map(len, members.values()))} images: {output / 'lists.jsonl'}")


if __name__ == "__main__":
    main()
