"""A run of videos: validation while it trains, then what was trained against its base, by command."""

import json

import pytest
import torch

from diffalign.cli import main
from diffalign.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    Run,
    TrainingConfig,
    ValidationConfig,
)
from diffalign.evaluation.drawing.samples import read_samples
from diffalign.media.videos import Video, write_video
from diffalign.runs.align import align
from tests.rewards.conftest import write_jsonl
from tests.video_pipelines import make_wan


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of a tiny Wan in half precision, validated at the first and the last."""
    folder = tmp_path_factory.mktemp("video_run")
    random = torch.manual_seed(0)
    for name in "ab":
        frames = torch.randint(0, 256, (9, 3, 32, 48), dtype=torch.uint8, generator=random)
        write_video(Video(frames, 8.0), folder / f"{name}.mp4")
    row = {"prompt": "a red square", "videos": ["a.mp4", "b.mp4"], "scores": [1.0, 0.0]}
    (folder / "prompts.txt").write_text("a red square\na blue circle\n")
    run = Run(
        output=str(folder / "run"),
        method={"type": "dpo"},
        model=ModelConfig(path=str(make_wan(folder / "wan")), dtype="bfloat16"),
        data=DataConfig(
            path=str(write_jsonl(folder / "pairs.jsonl", [row])),
            height=32, width=48, frames=5, fps=8.0, holdout=0.0,
        ),
        training=TrainingConfig(steps=2, mixed_precision="bf16"),
        logging=LoggingConfig(every=1, trackers=()),
        checkpoint=CheckpointConfig(every=2),
        validation=ValidationConfig(
            every=1, prompts=("a red square",), sampling_steps=2, frames=8, fps=4.0, rewards=("jpeg",)
        ),
    )  # fmt: skip
    align(run, lambda line: None)
    return folder / "run"


def test_validation_draws_videos_like_those_that_are_trained_on(run):
    folders = sorted((run / "samples").iterdir())
    assert [folder.name for folder in folders] == ["step-000000", "step-000001", "step-000002"]
    (sample,) = read_samples(folders[-1])
    # 5 of 8 frames: the largest number that the model takes
    assert sample.media.frames.shape == (5, 3, 32, 48) and sample.media.fps == 4.0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    watched = [row for row in rows if "validation/jpeg" in row]
    assert [row["step"] for row in watched] == [1, 2]
    assert {"validation/dynamic_degree", "validation/temporal_consistency"} <= set(watched[0])


def test_evaluate_compares_a_run_with_its_base_and_shows_motion(run, capsys):
    prompts = ["--prompts", str(run.parent / "prompts.txt")]
    options = ["--rewards", "jpeg", "--steps", "2", "--dtype", "float32"]
    assert main(["evaluate", "--run", str(run), *prompts, *options]) == 0
    said = capsys.readouterr()
    assert "dynamic_degree" in said.out and "report.html shows the videos" in said.err
    report = json.loads((run / "report.json").read_text())
    assert set(report["motion"]) >= {"dynamic_degree", "motion_smoothness"}
    drawn = [sample.media for sample in read_samples(run / "images" / "aligned")]
    assert len(drawn) == 2 and all(v.frames.shape == (5, 3, 32, 48) and v.fps == 8.0 for v in drawn)
    assert report["settings"]["sampling"]["num_frames"] == 5


def test_generated_videos_are_scored(run, capsys):
    drawn = run.parent / "drawn"
    options = ["--prompts", str(run.parent / "prompts.txt"), "--limit", "1", "--steps", "2", "--frames", "5"]
    assert main(["generate", str(run), *options, "--fps", "4", "--output", str(drawn)]) == 0
    assert f"1 video in {drawn};" in capsys.readouterr().err
    assert main(["score", str(drawn), "--rewards", "jpeg_incompressibility", "--json"]) == 0
    (mean,) = json.loads(capsys.readouterr().out)
    assert mean["images"] == 1 and mean["mean"] > 0
