"""Two pipelines of videos compared: rewards beside motion, the alarm, the report with videos in it."""

import base64
import json
import re

import pytest
import torch

from diffalign.errors import UserError
from diffalign.evaluation.contest import alone
from diffalign.evaluation.evaluate import compare_pipelines, evaluate
from diffalign.evaluation.report import embedding
from diffalign.evaluation.report.embedding import tag
from diffalign.evaluation.report.grids import grid_image
from diffalign.evaluation.report.report import RunFacts, render, report_data, write_report
from diffalign.media.videos import Video, read_video, write_video
from diffalign.rewards.videos import VideoReward
from diffalign.runs.compare import compare as compare_in_notebook
from tests.evaluation.fakes import FilmingPipeline, brightness
from tests.evaluation.test_evaluate_report import Checker

PROMPTS = [f"prompt {i}" for i in range(6)]
FPS, SIDE = 8, 32


def length(videos, prompts):
    return torch.tensor([float(len(video.frames)) for video in videos])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Make an aligned pipeline that is brighter and moves one pixel a frame, and a base that moves three."""
    rewards = {"light": brightness, "length": VideoReward("length", length)}
    folder = tmp_path_factory.mktemp("videos")
    pipelines = FilmingPipeline(speed=3), FilmingPipeline(speed=1, lift=10)
    return compare_pipelines(*pipelines, PROMPTS, rewards, images_per_prompt=2, folder=folder, progress=False)


def sources(compared):
    return [s.source for s in compared.base], [s.source for s in compared.aligned]


def test_rewards_stand_beside_motion(compared):
    evaluation = compared.evaluation
    assert evaluation.kind == "videos" and evaluation.verdict == "better"
    light, frames = (result.comparison for result in evaluation.rewards)
    assert light.gain.value == pytest.approx(10 * 12**2 / SIDE**2, abs=0.3)  # mp4 keeps a level to within one
    assert frames.base == frames.aligned == 5
    degree, dynamic, smoothness, consistency = evaluation.motion
    assert degree.base == pytest.approx(3 * FPS / SIDE, rel=0.1)
    assert degree.aligned == pytest.approx(1 * FPS / SIDE, rel=0.25)  # mp4 blurs sharp edges
    assert degree.change.low <= degree.aligned - degree.base <= degree.change.high < 0
    assert dynamic.base == 1.0 and smoothness.base > 0.9
    assert 0.8 < consistency.base < consistency.aligned < 1
    assert "diversity" in {change.name for change in evaluation.looks}


def test_the_alarm_sounds_when_motion_is_lost(compared):
    words = " ".join(compared.evaluation.alarm)
    assert "light rose but the dynamic degree" in words and "Look at the videos" in words


def test_report_json_has_motion_with_intervals(compared):
    data = report_data(compared.evaluation, RunFacts("dpo"))
    degree = data["motion"]["dynamic_degree"]
    assert degree["flagged"] and degree["change"] == pytest.approx(degree["aligned"] - degree["base"])
    assert degree["change_ci95"][0] <= degree["change"] <= degree["change_ci95"][1]
    assert list(data["motion"]) == ["dynamic_degree", "dynamic", "motion_smoothness", "temporal_consistency"]
    assert "dynamic_degree" not in data["image_statistics"]


def test_the_page_holds_its_videos(compared, tmp_path):
    path = write_report(tmp_path, compared.evaluation, *sources(compared), RunFacts("dpo", title="Wan"))
    text = path.read_text()
    page = Checker(text)
    videos = page.all("video")
    assert len(videos) == 2 * 2 * len(PROMPTS)
    for video in videos:
        assert {"controls", "loop", "muted", "playsinline"} <= set(video) and video["preload"] == "none"
        assert video["src"].startswith("data:video/mp4;base64,") and video["poster"].startswith("data:image/")
        assert video["class"] == "tiny" and (video["width"], video["height"]) == ("32", "32")
        assert video["aria-label"].split(":")[0] in ("base model", "aligned model")
    assert [b for b in page.all("button") if "data-play" in b]
    shown = read_video(base64.b64decode(videos[0]["src"].split(",")[1]))
    assert shown.frames.shape == (5, 3, SIDE, SIDE) and shown.fps == FPS
    assert not re.search(r'(src|poster)="(?!data:)|href="(?!data:|#)', text)  # nothing is fetched
    anchors = re.findall(r'href="#([^"]+)"', text)
    assert anchors and all(text.count(f'id="{anchor}"') == 1 for anchor in anchors)
    joined = " ".join(page.texts)
    for words in ("Motion", "not VBench's figures", "share of dynamic videos", "12 pairs of videos"):
        assert words in joined, words
    assert json.loads((tmp_path / "report.json").read_text())["motion"]["dynamic"]["base"] == 1.0


def test_eight_videos_in_each_order_unless_told_otherwise(compared):
    page = Checker(
        render(alone(compared.evaluation, *sources(compared)), {"aligned": RunFacts("dpo")}, shown=1)
    )
    assert len(page.all("figure")) <= 3


def test_a_large_video_is_made_small_or_becomes_a_picture(monkeypatch, tmp_path):
    noise = torch.randint(0, 256, (4, 3, 300, 600), dtype=torch.uint8, generator=torch.manual_seed(0))
    write_video(Video(noise, 8.0), tmp_path / "a.mp4")
    text = tag(tmp_path / "a.mp4", 'of "noise"')
    assert len(text) < 1.5 * embedding.LIMIT and 'aria-label="of &quot;noise&quot;"' in text
    inside = read_video(base64.b64decode(re.search(r'src="data:video/mp4;base64,([^"]*)', text)[1]))
    assert inside.frames.shape[-1] <= 448 and inside.frames.shape[-1] == 2 * inside.frames.shape[-2]
    monkeypatch.setattr(embedding, "LIMIT", 1000)
    assert tag(tmp_path / "a.mp4", "x").startswith("<img") and "too large for the page" in tag(
        tmp_path / "a.mp4", "x"
    )


def test_kinds_are_not_mixed_and_rewards_of_videos_want_videos():
    from tests.evaluation.test_evaluate_report import shades

    video = Video(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 8.0)
    with pytest.raises(UserError, match="1 videos among 3 images"):
        evaluate([video, *shades(1)[:1]], shades(1)[:2], PROMPTS[:2], {"light": brightness}, progress=False)
    watching = {"length": VideoReward("length", length)}
    with pytest.raises(UserError, match="'length' judges videos"):
        evaluate(shades(1)[:1], shades(1)[:1], PROMPTS[:1], watching, progress=False)


def test_notebooks_and_pictures_show_videos(compared):
    base, aligned = sources(compared)
    shown = compare_in_notebook(base, aligned, [s.prompt for s in compared.base])
    assert len(Checker(shown._repr_html_()).all("video")) == 2 * len(base)
    sheet = grid_image(base[:2], aligned[:2], PROMPTS[:2], side=64)
    assert sheet.width == 2 * (2 * 64 + 6 + 20) + 20
