"""Video models of the real classes: guided pairs of real clips, and pipelines/densedpo.py from end to end."""

import json
import re
import runpy
import sys

import pytest
import torch

from diffalign.config.schema import ModelConfig
from diffalign.diffusion.randomness import derive
from diffalign.errors import UserError
from diffalign.media.videos import Video, read_video, write_video
from diffalign.models.loading import load
from diffalign.preferences.video_takes.clips import read_clips
from diffalign.preferences.video_takes.guided import denoised, even_times, noised
from diffalign.preferences.video_takes.make import PairSettings, make_pairs, read_pixels
from diffalign.tiny import motions
from tests.helpers import PUBLISHED_DATA, ROOT
from tests.video_pipelines import make_cogvideox, make_wan

pytest.importorskip("av")
REAL = PUBLISHED_DATA / "videoalign"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def model(tiny):
    return load(ModelConfig(path=str(tiny), max_sequence_length=16))


def clips_folder(folder, count):
    for number, (caption, video) in enumerate(motions.clips("train", count)):
        write_video(video, folder / f"{number}.mp4")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def test_two_takes_of_a_video(model, tmp_path):
    """What the files hold is what the parts give: encode, noise to n / N, Euler back, decode."""
    (clip,) = read_clips(str(clips_folder(tmp_path / "clips", 1)))
    settings = PairSettings(32, 32, frames=16, steps=4, guidance=1.0, eta=(0.75, 0.75))
    made = make_pairs(model, [clip], settings, tmp_path / "pairs", progress=False)
    row = json.loads(made.path.read_text())
    assert row["prompt"] == clip.prompt and row["eta"] == 0.75 and row["made_from"] == str(clip.path)
    one, two = (read_video(made.path.parent / name) for name in row["videos"])
    assert one.frames.shape == two.frames.shape == (13, 3, 32, 32)  # of 16 the model takes 13
    assert one.fps == motions.FPS and not torch.equal(one.frames, two.frames)

    pixels, fps = read_pixels(clip.path, model, settings)
    assert pixels.shape == (1, 3, 13, 32, 32) and fps == motions.FPS
    x0, _ = model.encode_pixels(pixels)
    seed = derive(0, "noise", "0.mp4", 0, 1)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    times, cond = even_times(0.75, 4), model.encode_prompts([clip.prompt])
    states = noised(model.denoiser(), x0, eps, times)
    torch.testing.assert_close(states, 0.25 * x0 + 0.75 * eps)
    take = model.decode(denoised(model.denoiser(), states, times, cond))[0].transpose(0, 1)
    again = tmp_path / "again.mp4"
    write_video(Video((take * 255).round().to(torch.uint8), fps), again)
    assert torch.equal(read_video(again).frames, two.frames)


def test_real_videos_of_any_rate_and_size(model, tmp_path):
    rows = [{"caption": "a girl", "video": str(REAL / f"example_3_{side}.mp4")} for side in "AB"]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PairSettings(32, 48, frames=9, fps=8.0, steps=2, guidance=3.0)
    made = make_pairs(model, read_clips(str(tmp_path / "clips.jsonl")), settings, tmp_path, progress=False)
    assert made.pairs == 2 and not made.unreadable
    for row in map(json.loads, made.path.read_text().splitlines()):
        for name in row["videos"]:
            video = read_video(tmp_path / name)
            assert video.frames.shape == (9, 3, 32, 48) and video.fps == 8


def test_a_variance_preserving_model_of_videos(tmp_path):
    """CogVideoX: DDIM's last steps, nine frames."""
    model = load(ModelConfig(path=str(make_cogvideox(tmp_path / "model"))))
    clips = read_clips(str(clips_folder(tmp_path / "clips", 1)))
    settings = PairSettings(64, 96, frames=9, steps=4)
    made = make_pairs(model, clips, settings, tmp_path / "pairs", progress=False)
    names = json.loads(made.path.read_text())["videos"]
    one, two = (read_video(made.path.parent / name) for name in names)
    assert one.frames.shape == (9, 3, 64, 96) and not torch.equal(one.frames, two.frames)


def densedpo(monkeypatch, tiny, tmp_path, *more):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(caption for caption, _ in motions.clips("test", 2)))
    arguments = ["--clips", "2", "--steps", "2", "--rewards", "jpeg", "--margin", "0", "--count", "1"]
    arguments += ["--prompts", str(prompts), "--model.path", str(tiny), "--output", str(tmp_path / "run")]
    arguments += ["--training.steps", "2", "--training.batch_size", "2", "--data.holdout", "0"]
    monkeypatch.setattr(sys, "argv", ["densedpo.py", *arguments, "--checkpoint.every", "1", *more])
    runpy.run_path(str(ROOT / "pipelines" / "densedpo.py"), run_name="__main__")


def test_the_whole_pipeline(tiny, tmp_path, monkeypatch, capsys):
    densedpo(monkeypatch, tiny, tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"2 pairs; segments: \d first, \d second, \d tie", said)
    for name in ("jpeg", "dynamic_degree", "motion_smoothness"):
        assert re.search(rf"{name}: [+-]\d\.\d{{4}}, 95 % interval", said)
    (row, *_) = map(json.loads, (tmp_path / "run" / "pairs" / "labelled.jsonl").read_text().splitlines())
    assert len(row["segments"]) == 2 and len(row["segments"][0]) == 2  # 17 frames at 8 a second
    assert (tmp_path / "run" / "aligned").is_dir() and (tmp_path / "run" / "compared.json").is_file()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics


def test_the_baseline_with_one_label_a_pair(tiny, tmp_path, monkeypatch, capsys):
    baseline = ["--method.type", "dpo", "--data.view", "majority", "--eta", "1", "1"]
    densedpo(monkeypatch, tiny, tmp_path, *baseline)
    assert "dynamic_degree:" in capsys.readouterr().out
    row = json.loads((tmp_path / "run" / "pairs" / "pairs.jsonl").read_text().splitlines()[0])
    assert row["eta"] == 1.0


def test_without_pyav_nothing_is_begun(model, tmp_path, monkeypatch):
    (clip,) = read_clips(str(clips_folder(tmp_path / "clips", 1)))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r'pip install "diffalign\[video\]"'):
        make_pairs(model, [clip], PairSettings(32, 32, steps=1), tmp_path / "pairs", progress=False)
    assert not (tmp_path / "pairs").exists()
