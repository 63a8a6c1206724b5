"""The shipped flow models: diffusers pipelines that follow captions, and their pre-training."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from diffalign import tiny
from diffalign.tiny import motion_judge
from diffalign.tiny.judge import judge
from diffalign.tiny_build import flow_training, sd3, wan
from diffalign.tiny_build.report import sizes
from diffalign.tiny_build.video_autoencoder import encode, scaled, to_tensor


@pytest.fixture(scope="module")
def tiny_sd3():
    # diffusers' way to do without T5: it must be told, whatever the folder says
    pipe = StableDiffusion3Pipeline.from_pretrained(
        tiny.pipeline_path("sd3"), text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def tiny_wan():
    pipe = WanPipeline.from_pretrained(tiny.pipeline_path("wan"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize("more", [{"max_sequence_length": 8}, {}])
def test_the_tiny_sd3_draws_what_it_is_told_with_few_zeros_and_with_the_default_256(tiny_sd3, more):
    count = 24 if more else 12
    prompts = tiny.prompts("validation", count)
    images = tiny_sd3(
        prompts,
        num_inference_steps=12,
        guidance_scale=2.0,
        generator=generators(count),
        output_type="np",
        **more,
    ).images
    assert images.shape == (count, 32, 32, 3)
    own = np.mean([judge(i, p) for i, p in zip(images, prompts, strict=True)])
    other = np.mean([judge(i, p) for i, p in zip(images, prompts[1:] + prompts[:1], strict=True)])
    assert own > other + 0.05


def test_the_tiny_wan_shows_what_it_is_told(tiny_wan):
    count = 12
    prompts = tiny.motion_prompts("validation", count)
    clips = wan.sample(tiny_wan, prompts, seed=0, steps=10)
    assert clips.shape == (count, 17, 32, 32, 3)
    turned = prompts[1:] + prompts[:1]
    for rule in (motion_judge.content, motion_judge.motion):
        own = np.mean([rule(c, p) for c, p in zip(clips, prompts, strict=True)])
        other = np.mean([rule(c, p) for c, p in zip(clips, turned, strict=True)])
        assert own > other + 0.1


def test_the_default_call_of_the_tiny_wan_works(tiny_wan):
    video = tiny_wan(
        "a red circle moves left quickly", height=32, width=32, num_frames=17, num_inference_steps=2
    )
    assert video.frames.shape == (1, 17, 32, 32, 3)


def test_pipelines_are_of_the_real_classes(tiny_sd3, tiny_wan):
    assert type(tiny_sd3.transformer) is SD3Transformer2DModel and tiny_sd3.text_encoder_3 is None
    assert type(tiny_wan.transformer) is WanTransformer3DModel and type(tiny_wan.vae) is AutoencoderKLWan
    assert type(DiffusionPipeline.from_pretrained(tiny.pipeline_path("wan"))) is WanPipeline
    assert tiny_wan.scheduler.config.use_flow_sigmas and tiny_sd3.scheduler.config.shift == 2.0
    assert {p.dtype for p in tiny_sd3.transformer.parameters()} == {torch.float32}


def test_words_are_single_tokens_and_other_text_is_spelt(tiny_wan):
    for text in tiny.motion_prompts("test", 20):
        ids = tiny_wan.tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 1 and tiny_wan.tokenizer.unk_token_id not in ids
        assert tiny_wan.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tiny_wan.tokenizer("Zebra!").input_ids) == 8


def test_latents_of_the_video_autoencoder_are_standard_and_decode_to_the_clip(tiny_wan):
    from diffalign.tiny_build import motion_corpus

    vae, clips = tiny_wan.vae, motion_corpus.make(16, seed=9, clean=True)
    z = encode(vae, to_tensor(clips.frames))
    assert z.shape == (16, 16, 5, 4, 4)
    moments = torch.tensor([vae.config.latents_mean, vae.config.latents_std])[..., None, None, None]
    normal = (z - moments[0]) / moments[1]
    assert abs(normal.mean()) < 0.2 and 0.8 < normal.std() < 1.2
    with torch.no_grad():
        pixels = vae.decode(z).sample
    error = (pixels - scaled(to_tensor(clips.frames))).square().mean()
    assert 10 * torch.log10(4 / error) > 22


@pytest.mark.parametrize("count", [1, 9, 200])
def test_one_counted_zero_is_that_many_of_them_sd3(tiny_sd3, count):
    parts = sd3.Parts()
    parts.restore(tiny_sd3)
    prompts, z, time = tiny.prompts("test", 2), torch.randn(2, 8, 8, 8), torch.tensor([900.0, 100.0])
    states, _, pooled, _ = tiny_sd3.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=count
    )
    zeros = sd3.CountedZeros()
    zeros.count = count
    parts.transformer.set_attn_processor(zeros)
    with torch.no_grad():
        theirs = tiny_sd3.transformer(
            hidden_states=z, timestep=time, encoder_hidden_states=states, pooled_projections=pooled
        ).sample
        ours = parts(z, time, parts.tokens(prompts))
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("tokens", [16, 24, 512])
def test_one_counted_zero_is_that_many_of_them_wan(tiny_wan, tokens):
    parts = wan.Parts()
    parts.restore(tiny_wan)
    prompts, z = tiny.motion_prompts("test", 2), torch.randn(2, 16, 5, 4, 4)
    time = torch.tensor([900.0, 100.0])
    states, _ = tiny_wan.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=tokens)
    zeros = wan.CountedZeros()
    zeros.count = tokens - 15
    parts.transformer.set_attn_processor(zeros)
    with torch.no_grad():
        theirs = tiny_wan.transformer(hidden_states=z, timestep=time, encoder_hidden_states=states).sample
        ours = parts(z, time, *parts.tokens(prompts))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_training_goes_on_from_its_checkpoint(tmp_path):
    def run(seconds, keep):
        torch.manual_seed(0)
        parts = torch.nn.Linear(3, 3)
        target = torch.eye(3)

        def loss(_):
            x = torch.randn(16, 3)
            return (parts(x) - x @ target).square().mean()

        plan = flow_training.Plan(seconds, 0.1, keep, decay=0.9, every=0.0)
        return parts, flow_training.fit(parts, loss, plan, lambda _: None)

    keep = tmp_path / "state.pt"
    _, first = run(1.0, keep)
    parts, second = run(2.5, keep)
    assert second["steps"] > first["steps"] and 2.5 <= second["seconds"] < 2.9
    assert torch.allclose(parts.weight, torch.eye(3), atol=0.05)


def test_flow_weights_stay_small():
    bytes_of = sizes(tiny.WEIGHTS)
    assert bytes_of["sd3"] + bytes_of["wan"] <= 8e6
