"""Run DenseDPO end to end: real clips, two takes of each, a label a second, training, and the gain.

    python pipelines/densedpo.py --videos clips/ --rewards my_video_reward --output runs/densedpo

Clips are files with captions, ``NAME.mp4`` and ``NAME.txt``. This is ``diffalign video-pairs``,
``label-segments`` and ``train``; existing results are reused. Baselines: ``--method.type dpo --data.view
majority`` has one label a pair (StructuralDPO); with ``--eta 1 1`` pairs are independent samples
(VanillaDPO). Without arguments it runs on moving shapes and the built-in tiny Wan.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffalign.data import read_prompts
from diffalign.evaluation.measuring.motion import MOTION, motion_statistics
from diffalign.evaluation.measuring.statistics import bootstrap_mean
from diffalign.export.aligned import load_aligned
from diffalign.media.videos import Video, write_video
from diffalign.models.loading import load
from diffalign.preferences.segments.by_reward import ByReward
from diffalign.preferences.segments.label import label_pairs
from diffalign.preferences.segments.pairs import read_pairs
from diffalign.preferences.video_takes.clips import read_clips
from diffalign.preferences.video_takes.make import PairSettings, make_pairs
from diffalign.rewards import load as load_reward
from diffalign.rewards.videos import takes_videos
from diffalign.runs.align import align
from diffalign.runs.validate import read_run
from diffalign.tiny import motions
from diffalign.utils.chat_completions import Answers
from diffalign.utils.files import write_atomic


def moving_shapes(folder: Path, count: int) -> str:
    """Write clips of moving shapes as files with captions; return the folder."""
    for number, (caption, video) in enumerate(motions.clips("train", count)):
        if not (folder / f"{number:05}.txt").is_file():
            write_video(video, folder / f"{number:05}.mp4")
            write_atomic(folder / f"{number:05}.txt", caption)
    return str(folder)


def sampled(pipeline: Any, prompts: list[str], config: PairSettings) -> Iterator[Video]:
    """Yield one video a prompt; its noise depends on the prompt's number only."""
    pipeline.set_progress_bar_config(disable=True)
    for number, prompt in enumerate(prompts):
        noise = torch.Generator().manual_seed(number)
        frames = pipeline(
            prompt=prompt, num_inference_steps=config.steps, guidance_scale=config.guidance, generator=noise,
            height=config.height, width=config.width, num_frames=config.frames, output_type="pt",
        ).frames[0]  # fmt: skip
        yield Video((frames.float().clamp(0, 1) * 255).round().byte().cpu(), config.fps or 16.0)


def main() -> None:
    """Make pairs, label them, train, and print the gain with its interval."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny_wan_densedpo", help="a recipe of configs/ or a YAML file")
    parser.add_argument("--videos", help="a folder of clips with captions, or json lines of them")
    parser.add_argument("--clips", type=int, default=512, help="how many of them")
    parser.add_argument("--eta", type=float, nargs=2, default=(0.65, 0.8), help="how far clips are noised")
    parser.add_argument("--rewards", default="video_content", help="of `diffalign rewards`: judges")
    parser.add_argument("--margin", type=float, default=0.05, help="scores this near are a tie")
    parser.add_argument("--prompts", default="tiny:motions/test", help="a file of held-out prompts")
    parser.add_argument("--count", type=int, default=64, help="how many of them")
    parser.add_argument("--steps", type=int, default=40, help="of the sampler")
    parser.add_argument("--guidance", type=float, default=3.0)
    arguments, flags = parser.parse_known_args()
    run, device = read_run(arguments.recipe, flags), "cuda" if torch.cuda.is_available() else "cpu"
    data, work = run.data, Path(run.output) / "pairs"
    shape = (data.height or data.resolution, data.width or data.resolution, data.frames, data.fps)
    settings = PairSettings(*shape, tuple(arguments.eta), arguments.steps, arguments.guidance)
    clips = read_clips(arguments.videos or moving_shapes(work / "clips", arguments.clips), arguments.clips)
    made = make_pairs(load(run.model, device), clips, settings, work)
    rewards = {name: load_reward(name, device) for name in arguments.rewards.split(",")}
    judge = ByReward(rewards, arguments.margin, data.segment_seconds, Answers(work / "scores.jsonl"))
    print(label_pairs(read_pairs(str(made.path)), judge, str(made.path), work / "labelled.jsonl").text)
    result = align(replace(run, data=replace(data, path=str(work / "labelled.jsonl"))))
    if result.aligned is None:
        raise SystemExit(f"interrupted after step {result.steps}; call it again with --resume latest")
    prompts, values = read_prompts(arguments.prompts, arguments.count), []
    for pipeline in (load(run.model, device).pipeline, load_aligned(run.model, result.aligned, device)):
        videos = list(sampled(pipeline, prompts, settings))
        scores = {name: takes_videos(reward)(videos, prompts).tolist() for name, reward in rewards.items()}
        moves = [motion_statistics(video) for video in videos]
        values.append(scores | {name: [move[name] for move in moves] for name in MOTION})
    for name, base in values[0].items():
        gain = bootstrap_mean([after - before for before, after in zip(base, values[1][name], strict=True)])
        print(f"{name}: {gain.value:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}")
    write_atomic(Path(run.output) / "compared.json", json.dumps(values))


if __name__ == "__main__":
    main()
