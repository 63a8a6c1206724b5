"""An image is a function of (seed, prompt, number): not of batches, order, ranks or earlier images."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.drawing.pipeline import fingerprint
from diffalign.evaluation.drawing.samples import read_samples
from diffalign.evaluation.drawing.sampling import SamplingSettings, generate
from diffalign.media.files import open_image
from tests.evaluation.fakes import FilmingPipeline, PaintingPipeline
from tests.tiny_pipelines import make_qwen_image, make_sd15

PROMPTS = ["a cat", "a dog", "a tree"]


def draw(pipeline=None, prompts=PROMPTS, *settings, **options):
    return generate(pipeline or PaintingPipeline(), prompts, *settings, progress=False, **options)


def pixels(samples):
    return {(s.prompt, s.number): np.asarray(s.image).tobytes() for s in samples}


def test_every_image_has_noise_of_its_own():
    samples = draw(images_per_prompt=3)
    assert [(s.prompt, s.position, s.number) for s in samples[:4]] == [
        ("a cat", 0, 0),
        ("a cat", 0, 1),
        ("a cat", 0, 2),
        ("a dog", 1, 0),
    ]
    assert len(set(pixels(samples).values())) == 9
    assert pixels(draw(seed=1))["a cat", 0] != pixels(samples)["a cat", 0]


def test_batches_order_and_ranks_do_not_matter():
    expected = pixels(draw(images_per_prompt=2))
    assert pixels(draw(images_per_prompt=2, batch_size=1)) == expected
    assert pixels(draw(prompts=PROMPTS[::-1], images_per_prompt=2, batch_size=4)) == expected
    halves = [draw(images_per_prompt=2, rank=r, world=2) for r in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == 3
    assert pixels(halves[0]) | pixels(halves[1]) == expected
    assert pixels(draw(prompts=["a dog"])) == {("a dog", 0): expected["a dog", 0]}


def test_a_prompt_given_twice_gets_further_images():
    samples = draw(prompts=["a cat", "a dog", "a cat"])
    assert [(s.prompt, s.number) for s in samples] == [("a cat", 0), ("a dog", 0), ("a cat", 1)]
    assert pixels(samples) == {
        k: v for k, v in pixels(draw(images_per_prompt=2)).items() if k in pixels(samples)
    }


def test_settings_reach_the_pipeline_and_none_is_left_out():
    pipeline = PaintingPipeline()
    samples = draw(pipeline, PROMPTS, SamplingSettings(num_inference_steps=7, height=4))
    assert pipeline.calls == [{"prompt": PROMPTS, "steps": 7, "guidance": 1.0}]
    assert samples[0].image.size == (8, 4)


def test_a_setting_that_the_pipeline_does_not_take_is_an_error():
    with pytest.raises(
        UserError, match="negative_prompt is 'ugly', but PaintingPipeline takes no negative_prompt"
    ):
        draw(None, PROMPTS, SamplingSettings(negative_prompt="ugly"))


def test_a_folder_is_filled_once_and_continued(tmp_path):
    first = PaintingPipeline()
    expected = pixels(draw(first, folder=tmp_path, images_per_prompt=2))
    assert expected == pixels(draw(images_per_prompt=2))
    again = PaintingPipeline(network=first.network)
    assert pixels(draw(again, folder=tmp_path, images_per_prompt=2)) == expected and not again.calls
    victim = next(s for s in read_samples(tmp_path) if s.prompt == "a dog" and s.number == 1)
    victim.source.unlink()
    assert len(read_samples(tmp_path)) == 5
    assert pixels(draw(again, folder=tmp_path, images_per_prompt=2)) == expected
    assert [call["prompt"] for call in again.calls] == [["a dog"]]
    assert pixels(read_samples(tmp_path)) == expected
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


def test_images_of_other_weights_settings_or_seeds_are_drawn_anew(tmp_path):
    pipeline = PaintingPipeline()
    draw(pipeline, folder=tmp_path)
    with torch.no_grad():
        pipeline.network.weight[0, 0] += 1e-3
    draw(pipeline, folder=tmp_path)
    draw(pipeline, PROMPTS, SamplingSettings(guidance_scale=2.0), folder=tmp_path)
    draw(pipeline, folder=tmp_path, seed=1)
    assert len(pipeline.calls) == 4
    assert len(read_samples(tmp_path)) == 3  # the manifest lists the last


def test_manifests_of_ranks_are_read_together(tmp_path):
    pipeline = PaintingPipeline()
    for rank in (0, 1):
        draw(pipeline, folder=tmp_path, rank=rank, world=2)
    assert [s.prompt for s in read_samples(tmp_path)] == PROMPTS
    row = json.loads((tmp_path / "manifest-0-of-2.jsonl").read_text().splitlines()[0])
    assert row["prompt"] == "a cat" and row["settings"]["seed"] == 0


def test_networks_are_in_eval_mode_while_sampling_only():
    pipeline = PaintingPipeline(network=nn_with_frozen_part())
    draw(pipeline)
    assert pipeline.trained == [False]
    assert pipeline.network.training and not pipeline.network[0].training


def nn_with_frozen_part():
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    network[0].eval()
    return network


def test_fingerprints_follow_the_weights():
    a, b = PaintingPipeline(), PaintingPipeline()
    assert fingerprint(a) != fingerprint(b)
    b.network.load_state_dict(a.network.state_dict())
    assert fingerprint(a) == fingerprint(b)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["a", " "]}, "prompt 1 is empty"),
        ({"prompts": "a cat"}, "a list"),
        ({"images_per_prompt": 0}, "images_per_prompt is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world": 2}, "rank is 2"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(UserError, match=words):
        draw(**options)


def test_unreadable_folders_and_images(tmp_path):
    with pytest.raises(UserError, match=r"no manifest.jsonl"):
        read_samples(tmp_path)
    (tmp_path / "manifest.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="line 1 is not a sample"):
        read_samples(tmp_path)
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"x.png"):
        open_image(tmp_path / "x.png")
    assert open_image(Image.new("L", (2, 2))).mode == "RGB"


def test_a_real_pipeline_draws_the_same_in_any_batch(tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(make_sd15(tmp_path))
    settings = SamplingSettings(num_inference_steps=2, guidance_scale=3.0, height=32, width=32)
    together, alone = (draw(pipeline, PROMPTS, settings, batch_size=b) for b in (3, 1))
    for a, b in zip(together, alone, strict=True):
        difference = np.abs(np.asarray(a.image, dtype=int) - np.asarray(b.image, dtype=int))
        assert difference.max() <= 1  # the network's arithmetic differs in its last bits
    assert np.asarray(together[0].image).std() > 1
    before = fingerprint(pipeline)
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    assert fingerprint(pipeline) != before


def test_qwen_images_guidance_is_its_classifier_free_one(tmp_path):
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(make_qwen_image(tmp_path))
    size = {"num_inference_steps": 2, "height": 32, "width": 32}
    (drawn,) = draw(pipeline, ["two"], SamplingSettings(guidance_scale=4.0, **size))
    guided, plain = (
        pipeline("two", generator=torch.Generator().manual_seed(drawn.seed), **size, **arguments).images[0]
        for arguments in ({"true_cfg_scale": 4.0, "negative_prompt": ""}, {})
    )
    assert np.array_equal(np.asarray(drawn.image), np.asarray(guided))
    assert not np.array_equal(np.asarray(guided), np.asarray(plain))


def frames(samples):
    return {(s.prompt, s.number): s.media.frames.numpy().tobytes() for s in samples}


def test_a_pipeline_that_takes_frames_gives_videos():
    pipeline = FilmingPipeline()
    samples = draw(pipeline, images_per_prompt=2)
    assert [call["prompt"] for call in pipeline.calls] == [
        [p] for p in PROMPTS for _ in range(2)
    ]  # one at once
    assert all(s.media.fps == 8 and s.media.frames.shape == (5, 3, 32, 32) for s in samples)
    assert samples[0].media.frames.dtype == torch.uint8 and len(set(frames(samples).values())) == 6
    expected = frames(samples)
    assert frames(draw(images_per_prompt=2, batch_size=4, pipeline=FilmingPipeline())) == expected
    halves = [draw(FilmingPipeline(), images_per_prompt=2, rank=r, world=2) for r in (0, 1)]
    assert frames(halves[0]) | frames(halves[1]) == expected
    with pytest.raises(UserError, match="'a cat' is a video, not an image"):
        _ = samples[0].image


def test_frames_and_their_rate():
    pipeline = FilmingPipeline()
    settings = SamplingSettings(num_frames=3, fps=4, max_sequence_length=8)
    (sample,) = draw(pipeline, PROMPTS[:1], settings)
    assert pipeline.calls == [{"prompt": PROMPTS[:1], "frames": 3, "rate": 4, "steps": 3}]
    assert sample.media.fps == 4 and len(sample.media.frames) == 3
    with pytest.raises(
        UserError, match=r"num_frames=3 .--frames, --fps. with PaintingPipeline, which draws images"
    ):
        draw(None, PROMPTS, SamplingSettings(num_frames=3))
    with pytest.raises(
        UserError, match=r"sampling.fps=8 .--frames, --fps. with PaintingPipeline, which draws images"
    ):
        draw(None, PROMPTS, SamplingSettings(fps=8))


def test_a_folder_of_videos_is_filled_once_and_continued(tmp_path):
    first = FilmingPipeline()
    expected = frames(draw(first, folder=tmp_path))
    files = sorted(tmp_path.glob("*.mp4"))
    assert len(files) == 3 and not list(tmp_path.glob("*.tmp"))
    assert frames(read_samples(tmp_path)) == expected and read_samples(tmp_path)[0].media.fps == 8
    again = FilmingPipeline(network=first.network)
    files[0].unlink()
    assert frames(draw(again, folder=tmp_path)) == expected and len(again.calls) == 1
    draw(again, PROMPTS, SamplingSettings(fps=4), folder=tmp_path)  # the rate is part of what is written
    assert len(again.calls) == 4


def test_a_tiny_wan_draws_what_its_pipeline_draws(tmp_path):
    from diffusers import WanPipeline

    from tests.video_pipelines import make_wan

    pipeline = WanPipeline.from_pretrained(make_wan(tmp_path / "wan"))
    settings = SamplingSettings(2, 3.0, 32, 32, num_frames=5, max_sequence_length=16)
    (sample,) = draw(pipeline, PROMPTS[:1], settings)
    assert sample.media.fps == 16.0
    expected = pipeline(
        PROMPTS[0], generator=torch.Generator().manual_seed(sample.seed), num_inference_steps=2,
        guidance_scale=3.0, height=32, width=32, num_frames=5, max_sequence_length=16, output_type="np",
    ).frames[0]  # fmt: skip
    assert np.abs(sample.media.frames.permute(0, 2, 3, 1).numpy() / 255 - expected).max() <= 0.5 / 255 + 1e-6


def test_without_pyav_no_video_is_drawn_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    pipeline = FilmingPipeline()
    with pytest.raises(UserError, match="videos need PyAV"):
        draw(pipeline, folder=tmp_path / "videos")
    assert not pipeline.calls and not (tmp_path / "videos").exists()
    assert len(draw(pipeline)) and len(draw(PaintingPipeline(), folder=tmp_path / "images"))


def test_what_a_pipeline_cannot_draw_is_refused(tmp_path):
    """Sizes before anything is drawn, what diffusers refuses at the first call, and NaN, which is black."""
    pipeline = StableDiffusionPipeline.from_pretrained(make_sd15(tmp_path / "sd15"))
    for height, width in ((None, 17), (16, 17)):
        with pytest.raises(
            UserError, match=r"--height, --width: .*17 pixels; allowed with sd15: multiples of"
        ):
            draw(pipeline, ["a"], SamplingSettings(1, height=height, width=width), folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"StableDiffusionPipeline \(float32\) draws pixels that are NaN"):
        draw(pipeline, ["a"], SamplingSettings(1, height=16, width=16))


class Refusing(PaintingPipeline):
    def check_inputs(self):
        raise ValueError("`height` has to be divisible by 16")

    def __call__(self, **arguments):
        self.check_inputs()


def test_settings_that_diffusers_refuses_are_an_error_of_the_user():
    with pytest.raises(UserError, match="Refusing refuses these settings: `height` has to be div"):
        draw(Refusing())
