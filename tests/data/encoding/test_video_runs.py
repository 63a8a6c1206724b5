"""Whole runs on videos: real pairs through the cache and two steps of a tiny Wan, dense labels with held-out
ones.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    Run,
    TrainingConfig,
)
from diffalign.errors import UserError
from diffalign.models.loaded import LoadedModel
from diffalign.runs import setup as material
from diffalign.runs.align import align
from tests.data.conftest import film, write_jsonl
from tests.helpers import PUBLISHED_DATA
from tests.video_pipelines import make_wan

pytest.importorskip("av")
CSV = PUBLISHED_DATA / "videoalign" / "example.csv"


def silent(line):
    pass


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return str(make_wan(tmp_path_factory.mktemp("wan")))


def run_of(wan, output, method="dpo", steps=2, **data):
    clip = {"height": 32, "width": 48, "frames": 9, "fps": 8.0, "cache_batch_size": 2, "holdout": 0.0}
    return Run(
        output=str(output),
        method={"type": method},
        model=ModelConfig(path=wan),
        data=DataConfig(**{**clip, **data}),
        training=TrainingConfig(steps=steps, batch_size=2),
        logging=LoggingConfig(every=1, diagnostics_bins=2),
        checkpoint=CheckpointConfig(every=2),
    )


def rows_of(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def test_real_pairs_go_through_the_cache_and_two_steps(wan, tmp_path, monkeypatch):
    run, said = run_of(wan, tmp_path / "run", path=str(CSV), label="VQ"), []
    result = align(run, said.append)
    assert result.steps == 2
    assert any("2 pairs, 0 ties, 0 rows without label, 0 unreadable" in line for line in said)
    first, second = rows_of(tmp_path / "run")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and second["loss"] != first["loss"]
    # again, over the same cache: nothing is encoded anew, and the numbers are the same
    monkeypatch.setattr(LoadedModel, "encode_pixels", lambda *_: pytest.fail("encoded again"))
    cache = str(tmp_path / "run" / "cache")
    align(replace(run, output=str(tmp_path / "b"), data=replace(run.data, cache_dir=cache)), silent)
    assert [row["loss"] for row in rows_of(tmp_path / "b")] == [first["loss"], second["loss"]]


@pytest.fixture
def dense(tmp_path):
    rows = []
    for i in range(4):
        names = [film(tmp_path / f"{i}{side}.mp4", 2 * i + j, 12).name for j, side in enumerate("ab")]
        rows.append({"prompt": f"p{i}", "videos": names, "segments": [[1, 0, 1], [0, 1, 1]]})
    return str(write_jsonl(tmp_path / "dense.jsonl", rows))


def test_dense_labels_train_and_are_held_out(wan, tmp_path, dense):
    said = []
    run = run_of(wan, tmp_path / "run", "densedpo", path=dense, segment_seconds=0.5, holdout=0.25)
    result = align(run, said.append)
    assert any("4 pairs, 0 ties, 12 segments, 4 of them tied" in line for line in said)
    first, _ = rows_of(tmp_path / "run")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["rewards/accuracies"] == 0.5
    summary = json.loads((result.output / "summary.json").read_text())
    assert 0 <= summary["held_out"]["rewards/accuracies"] <= 1 and "held-out" in summary["verdict"]


def test_a_method_of_whole_videos_wants_one_label(wan, tmp_path, dense, monkeypatch):
    """Before anything is encoded; what turns out to be all ties is known after."""
    encoder = material.encode_preferences
    monkeypatch.setattr(material, "encode_preferences", lambda *a, **k: pytest.fail("the set was encoded"))
    run = run_of(wan, tmp_path / "run", path=dense, segment_seconds=0.5)
    with pytest.raises(UserError, match=r"method.type='dpo' compares whole videos, but labels are dense"):
        align(run, silent)
    monkeypatch.setattr(material, "encode_preferences", encoder)
    votes = replace(run, data=replace(run.data, view="majority"))
    with pytest.raises(UserError, match="nothing to learn from: 0 pairs, 4 ties"):
        align(votes, silent)


def test_a_method_of_segments_wants_dense_labels(wan, tmp_path, dense, monkeypatch):
    """A set may mix both; one without any dense label is refused before it is encoded."""
    with open(dense) as file:
        rows = [{**json.loads(line), "segments": None, "scores": [1, 0]} for line in file]
    path = str(write_jsonl(tmp_path / "global.jsonl", rows))
    monkeypatch.setattr(material, "encode_preferences", lambda *a, **k: pytest.fail("the set was encoded"))
    with pytest.raises(UserError, match="'densedpo' compares videos segment by segment, but no label is d"):
        align(run_of(wan, tmp_path / "run", "densedpo", path=path), silent)


def test_frames_and_models(wan, tmp_path, dense):
    for changes, message in (
        ({"frames": None, "fps": None}, "data.frames is null"),
        ({"frames": 10}, "data.frames=10; allowed with wan: such as 9"),
        ({"width": 40}, "32 x 40 pixels; allowed with wan: multiples of 16"),
    ):
        with pytest.raises(UserError, match=message):
            align(run_of(wan, tmp_path / "run", "densedpo", path=dense, **changes), silent)
    images = run_of(wan, tmp_path / "run", path="tiny:pairs", frames=None, fps=None)
    with pytest.raises(
        UserError, match=r"data.frames is null, but wan is a model of videos; allowed: such as 17"
    ):
        align(images, silent)
    pictures = run_of("tiny:sdxl", tmp_path / "run", path=dense)
    with pytest.raises(UserError, match=r"data.frames=9, but sdxl is a model of images; allowed: null"):
        align(pictures, silent)


def test_a_video_becomes_what_the_stock_autoencoder_makes_of_it(wan, tmp_path, dense):
    from diffusers import AutoencoderKLWan

    from diffalign.data import encode_preferences, read_preferences
    from diffalign.media.videos import read_video
    from diffalign.models.loading import load

    config = DataConfig(path=dense, height=32, width=48, frames=9, fps=8.0)  # as filmed: nothing is resized
    encoded = encode_preferences(
        load(ModelConfig(path=wan)), read_preferences(config), config, tmp_path / "c", False
    )
    vae = AutoencoderKLWan.from_pretrained(wan, subfolder="vae")
    pixels = read_video(tmp_path / "0a.mp4", frames=9).frames.transpose(0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
    center, spread = (
        torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    kept, _ = encoded.moments(encoded[0].images[0])
    assert kept.shape == (mean.shape[1], 3, *mean.shape[3:])
    torch.testing.assert_close(kept[None], (mean - center) / spread, atol=2e-4, rtol=1e-4)
