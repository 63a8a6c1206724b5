"""Policies that sample videos: tiny Wan and ModelScope networks of random weights in whole online runs."""

import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diffalign.config.schema import RolloutConfig
from diffalign.errors import UserError
from diffalign.models.loaded import LoadedModel
from diffalign.rewards.specs import Weighted
from diffalign.rewards.videos import to_videos
from diffalign.rollout.judges import InlineJudge, judge_of
from diffalign.runs.align import align
from diffalign.runs.online_checks import check_online
from diffalign.utils.text import read_json_lines
from tests.helpers import in_two_processes
from tests.runs.halves import silent, whole_as_halves
from tests.runs.video_worker import METHODS, change, run_of
from tests.video_pipelines import make_text_to_video, make_wan

MAKERS = {"wan": make_wan, "text_to_video": make_text_to_video}
RUNS = [
    *(("wan", method) for method in ("flow_grpo", "diffusion_nft", "awm", "dgpo", "dpo")),
    *(("text_to_video", method) for method in ("ddpo", "d3po", "spo", "dpo")),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: str(make(tmp_path_factory.mktemp(name))) for name, make in MAKERS.items()}


def rows_of(output):
    return [row for row in read_json_lines(output / "metrics.jsonl") if "loss" in row]


def parts_of(output, number=0):
    """Return the recorded tensors of a round, of all its parts."""
    files = sorted((output / "rollouts" / f"round-{number:06d}").glob("part-*.pt"))
    parts = [torch.load(file, weights_only=True) for file in files]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize(("family", "method"), RUNS)
def test_two_rounds_of_videos(family, method, models, tmp_path):
    """The first step finds policy and whoever sampled equal; a second round is of a policy that has moved."""
    run = run_of(models[family], tmp_path / "run", method, family)
    result = align(run, silent)
    rows = rows_of(result.output)
    assert len(rows) == result.steps == 4
    rounds = [row["rollout/round"] for row in rows if "rollout/round" in row]
    assert rounds[:2] == [0, 1]
    first = rows[0]
    if method in ("flow_grpo", "ddpo"):
        assert first["ratio"] == pytest.approx(1, abs=1e-4) and first["kl"] == pytest.approx(0, abs=1e-5)
    elif method in ("d3po", "spo", "dpo"):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    learned = load_file(result.output / "checkpoints" / "step-4" / "trainable.safetensors")
    assert all(bool(value.any()) for name, value in learned.items() if "lora_B" in name)
    assert f"videos sampled for prompts of {run.rollout.prompts}" in result.counts


def test_scores_are_those_of_what_the_stock_autoencoder_decodes(models, tmp_path):
    from diffusers import WanPipeline

    run = run_of(models["wan"], tmp_path / "run", "diffusion_nft")
    result = align(replace(run, training=replace(run.training, steps=2)), silent)
    pipeline, found = WanPipeline.from_pretrained(models["wan"]), parts_of(result.output)
    latents, scores = found["x"].flatten(0, 2), found["scores"].flatten()
    assert latents.shape == (4, 16, 2, 4, 4)
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(pipeline.vae.config[n]).view(shape) for n in ("latents_mean", "latents_std"))
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents * std + mean).sample
    frames = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().double() / 255
    moved = (frames[:, :, 1:] - frames[:, :, :-1]).abs().flatten(1).mean(1)
    torch.testing.assert_close(scores.double(), frames.flatten(1).mean(1) + moved + 6.0, atol=1e-5, rtol=0)
    assert scores.std() > 1e-4
    told = read_json_lines(result.output / "rollouts" / "round-000000" / "scores.jsonl")
    assert [score for line in told for score in line["change"]] == pytest.approx(scores.tolist())


def test_the_density_of_a_noisy_step_is_the_mean_over_channels_frames_and_space(models, tmp_path):
    """Flow-GRPO's equation 9 from the stock transformer: of latents (C, F, h, w), as of images (C, h, w)."""
    from diffusers import WanPipeline

    run = run_of(models["wan"], tmp_path / "run")
    result = align(run, silent)
    pipeline, found = WanPipeline.from_pretrained(models["wan"]), parts_of(result.output)
    prompts = [line["prompt"] for line in
               read_json_lines(result.output / "rollouts" / "round-000000" / "scores.jsonl")]  # fmt: skip
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=16)
    text = text.repeat_interleave(2, 0)  # two videos of each prompt
    assert found["x_t"].shape == (2, 2, 2, 16, 2, 4, 4)  # prompts, steps, videos, latents
    pipeline.scheduler.set_timesteps(3)
    for number in range(2):
        x, after, t, s, logp = (
            found[name][:, number].flatten(0, 1) for name in ("x_t", "x_s", "t", "s", "logp")
        )
        now, then = float(t[0]), float(s[0])
        with torch.no_grad():
            v = pipeline.transformer(x, pipeline.scheduler.timesteps[number].expand(4), text).sample
        g = 0.7 * math.sqrt(now / (1 - (then if now == 1 else now)))
        mean = x + (v + g**2 / (2 * now) * (x + (1 - now) * v)) * (then - now)
        std = g * math.sqrt(now - then)
        each = -((after - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
        torch.testing.assert_close(logp, each.sum((1, 2, 3, 4)) / (16 * 2 * 4 * 4), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("frames", "pieces"), [(1, [1] * 8), (10, [2] * 4), (14, [2] * 4), (500, [4, 4])])
def test_no_more_frames_lie_decoded_than_configured(frames, pieces, models, tmp_path, monkeypatch):
    """Videos of 5 frames, 4 in a part, two rounds: whole ones, and a piece is gone before the next."""
    decode, submit, seen, held = LoadedModel.decode, InlineJudge.submit, [], []

    def decoding(model, latents):
        assert all(piece() is None for piece in held), "the piece before is still there"
        pixels = decode(model, latents)
        assert pixels.shape[2] == 5
        return pixels

    def submitting(judge, images, prompts, t):
        held.append(weakref.ref(images))
        seen.append(len(images))
        return submit(judge, images, prompts, t)

    monkeypatch.setattr(LoadedModel, "decode", decoding)
    monkeypatch.setattr(InlineJudge, "submit", submitting)
    run = run_of(models["wan"], tmp_path / "run", "diffusion_nft", decoded_frames=frames)
    align(replace(run, training=replace(run.training, steps=2)), silent)
    assert seen == pieces and sum(seen) == 8


def test_a_resumed_run_is_one_to_the_bit(models, tmp_path):
    """Two steps are one of the two rounds."""
    whole_as_halves(tmp_path, lambda folder: run_of(models["wan"], folder))


def test_validation_draws_and_scores_videos(models, tmp_path):
    """Trained and watched rewards of the same videos, at their frame rate, before training and after."""
    pytest.importorskip("av")
    from diffalign.media.videos import read_video

    run = run_of(models["wan"], tmp_path / "run")
    watched = replace(run.validation, every=2, prompts=("a cat",), sampling_steps=2, rewards=("jpeg",))
    result = align(replace(run, validation=watched, training=replace(run.training, steps=2)), silent)
    whole = json.loads((result.output / "validation.json").read_text())
    assert whole["settings"]["trained"] == ["change"] and set(whole["settings"]["rewards"]) == {
        "change",
        "jpeg",
    }
    assert [entry["step"] for entry in whole["history"]["entries"]] == [0, 2]
    (file,) = (result.output / "samples" / "step-000002").glob("*.mp4")
    video = read_video(file)
    assert video.frames.shape == (5, 3, 32, 32) and video.fps == 6.0


def test_two_processes_are_one(models, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    align(run_of(models["wan"], one), silent)
    in_two_processes("tests.runs.video_worker", models["wan"], two, pipelines=True)
    paths = (folder / "checkpoints" / "step-4" / "trainable.safetensors" for folder in (one, two))
    alone, together = (load_file(path) for path in paths)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        assert value.abs().max() > 5e-3
        # Adam divides by the gradient's size: where it is near zero, its rounding is a part of a step of 1e-2
        torch.testing.assert_close(together[name], value, atol=1e-3, rtol=0)
    scores = [read_json_lines(f / "rollouts" / "round-000000" / "scores.jsonl") for f in (one, two)]
    assert [line["prompt"] for line in scores[0]] == [line["prompt"] for line in scores[1]]
    for here, there in zip(*scores, strict=True):
        assert here["change"] == pytest.approx(there["change"], abs=1e-4)


def settings(tmp_path, method="dpo", rollout=None, **data):
    run = run_of("nowhere", tmp_path / "run", method, **rollout or {})
    return replace(run, data=replace(run.data, **data))


@pytest.mark.parametrize(
    ("rollout", "data", "words"),
    [
        ({"by": "people", "rewards": ()}, {}, "rollout.by='people' with data.frames=5.*allowed: rewards"),
        ({"scoring": "process"}, {}, "rollout.scoring='process' with data.frames=5.*allowed: inline"),
        ({"decoder": "taesd"}, {}, "rollout.decoder='taesd' with data.frames=5.*allowed: null"),
        ({"resolution": 64}, {}, "rollout.resolution=64 with data.height=32 and data.width=32.*either"),
    ],
)
def test_what_is_not_done_with_videos(rollout, data, words, tmp_path):
    with pytest.raises(UserError, match=words):
        check_online(settings(tmp_path, rollout=rollout, **data))


@pytest.mark.parametrize("method", ["refl", "diff_instruct"])
def test_methods_that_sample_themselves_draw_images(method, tmp_path):
    METHODS.setdefault(method, {})
    with pytest.raises(UserError, match=f"method {method} with data.frames=5: it samples images"):
        check_online(settings(tmp_path, method))


def test_models_and_frames_must_fit(models, tmp_path):
    run = run_of(models["wan"], tmp_path / "run")
    for data, words in (
        ({"frames": None}, "data.frames is null, but wan is a model of videos; allowed: such as 17"),
        ({"frames": 6}, "data.frames=6; allowed with wan: such as 5"),
    ):
        with pytest.raises(UserError, match=words):
            align(replace(run, data=replace(run.data, **data)), silent)
    images = replace(run, model=replace(run.model, path="tiny:sd3"))
    with pytest.raises(UserError, match=r"data.frames=5, but sd3 is a model of images; allowed: null"):
        align(images, silent)


def test_judges_of_videos(tmp_path):
    """A reward of images is the mean over frames, at the given rate; rewards must judge what is sampled."""
    levels = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.2, 0.8]])
    pixels = levels[:, None, :, None, None].expand(2, 3, 3, 8, 8)
    first, _ = to_videos(pixels, 6.0)
    assert first.frames.dtype == torch.uint8 and first.fps == 6.0
    assert first.frames[:, 0, 0, 0].tolist() == [0, 128, 255]

    def bright(images, prompts):
        return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])

    loaded = {"jpeg": bright, "tests.runs.video_worker:change": None}
    config = RolloutConfig(rewards=("jpeg",))
    judge = judge_of(config, "cpu", lambda spec, device: loaded[spec], fps=6.0)
    found = judge.submit(pixels, ["a", "b"], torch.zeros(2)).result()
    torch.testing.assert_close(found, torch.tensor([[(0 + 128 + 255) / 3], [(51 + 51 + 204) / 3]]))
    spec = "tests.runs.video_worker:change"
    both = judge_of(RolloutConfig(rewards=(spec,)), "cpu", fps=6.0).submit(pixels, ["a", "b"], torch.zeros(2))
    torch.testing.assert_close(both.result()[:, 0], change(to_videos(pixels, 6.0), ["a", "b"]))
    with pytest.raises(UserError, match=f"reward '{spec}' judges videos, and these are images"):
        judge_of(RolloutConfig(rewards=(spec,)), "cpu")

    class Timed:
        def __call__(self, images, prompts):
            return torch.zeros(len(images))

        def at(self, images, prompts, t):
            return t

    with pytest.raises(UserError, match="'jpeg', which judges clean estimates of images by their times"):
        judge_of(config, "cpu", lambda spec, device: Timed(), fps=6.0)
    assert InlineJudge([Weighted("jpeg", 1.0)], [Timed()]).rewards == ("jpeg",)
