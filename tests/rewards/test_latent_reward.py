"""LPO's latent reward model: tiny random ones of the published layout against whole UNets with hooks."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.zoo.step_aware import TimedReward
from tests.rewards.conformance import assert_bfloat16_keeps_the_order, conforms, covers, pictures, some
from tests.tiny_pipelines import WIDTH, make_sd15, make_sdxl, text_config, tokenizer

PROMPTS = ["a red cat", "Red", "a dog that is far too long to be read to its very end", ""]
TIMES = torch.tensor([0.951, 0.3, 0.0, 0.001])
EMBEDDING = 12
SHARED_SHAPE = {"sample_size": 8, "layers_per_block": 2, "norm_num_groups": 4, "attention_head_dim": 2}


def unet(large):
    """Four levels as SD1.5's, or three as SDXL's; two layers on each, as both."""
    if large:
        return UNet2DConditionModel(
            **SHARED_SHAPE,
            block_out_channels=(8, 12, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + WIDTH,
        )
    return UNet2DConditionModel(**SHARED_SHAPE, block_out_channels=(4, 8, 12, 16), cross_attention_dim=WIDTH)


def write(folder, large, seed=3):
    """Write a model in the layout of casiatao/LRM."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet(large).save_pretrained(folder / "unet")
        CLIPTextModel(text_config(tokenizer())).save_pretrained(folder / "text_encoder")
        channels = 8 + 12 + 16 + 16 if large else 4 + 8 + 12 + 16 + 16
        heads = {"visual_projection": {"weight": torch.randn(WIDTH if large else EMBEDDING, channels)}}
        if large:
            second = CLIPTextModelWithProjection(text_config(tokenizer(pad="!")))
            second.save_pretrained(folder / "text_encoder_2")
            heads["logit_scale"] = 3.0
        else:
            heads["text_projection"] = {"weight": torch.randn(EMBEDDING, WIDTH)}
            heads["logit_scale"] = torch.tensor(3.0)
    torch.save(heads, folder / "state_dict.pt")
    return folder


@pytest.fixture(scope="session", params=["sd15", "sdxl"])
def made(request, tmp_path_factory):
    """Return a model, its base, and which of the two kinds it is."""
    large = request.param == "sdxl"
    folder, base = (tmp_path_factory.mktemp(name) for name in ("lrm", "base"))
    (make_sdxl if large else make_sd15)(base)
    write(folder, large)
    return SimpleNamespace(large=large, folder=folder, base=base, spec=f"latent_reward:{folder}@{base}")


@pytest.fixture
def reward(made):
    return rewards.load(made.spec, batch_size=2)


@pytest.fixture
def latents():
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))


class Watched:
    """A whole stock UNet that remembers the last layer of each level and the middle."""

    def __init__(self, folder):
        self.unet = UNet2DConditionModel.from_pretrained(folder).eval()
        self.seen = {}
        for number, block in enumerate(self.unet.down_blocks):
            cross = "CrossAttn" in type(block).__name__
            self._watch(block.attentions[1] if cross else block.resnets[1], number)
        self._watch(self.unet.mid_block, "middle")

    def _watch(self, layer, name):
        def remember(module, inputs, output):
            self.seen[name] = (output[0] if isinstance(output, tuple) else output).mean((2, 3))[0].numpy()

        layer.register_forward_hook(remember)

    def __call__(self, x, timestep, states, added):
        self.unet(x, timestep, encoder_hidden_states=states, added_cond_kwargs=added)
        return dict(self.seen)


@torch.no_grad()
def formula(made, latents, prompts, timesteps):
    """Return the scores, one sample and one half of the guidance at a time; texts as in stock pipelines."""
    parts = {"unet": None, "text_encoder": CLIPTextModel.from_pretrained(made.folder / "text_encoder")}
    if made.large:
        second = CLIPTextModelWithProjection.from_pretrained(made.folder / "text_encoder_2")
        pipeline = StableDiffusionXLPipeline.from_pretrained(made.base, **parts, text_encoder_2=second)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(made.base, **parts, safety_checker=None)
    heads = torch.load(made.folder / "state_dict.pt")
    watched, scores = Watched(made.folder / "unet"), []
    for x, prompt, timestep in zip(latents, prompts, timesteps, strict=True):
        seen = []
        for text in (prompt, ""):
            states, _, *pooled = pipeline.encode_prompt(
                text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            added = {}
            if made.large:
                added = {"text_embeds": pooled[0], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
            seen.append((watched(x[None], timestep, states, added), states, pooled))
        (c, states, pooled), (u, _, _) = seen
        levels = [c[i] for i in range(3 if made.large else 4)]
        features = np.concatenate([*levels, u["middle"] + 7.5 * (c["middle"] - u["middle"])])
        look = heads["visual_projection"]["weight"].numpy() @ features
        if made.large:
            word = pooled[0][0].numpy()
        else:
            ids = pipeline.tokenizer(prompt, max_length=16, truncation=True).input_ids
            word = heads["text_projection"]["weight"].numpy() @ states[0, len(ids) - 1].numpy()
        scores.append(np.exp(3) * look @ word / np.linalg.norm(look) / np.linalg.norm(word))
    return torch.tensor(np.array(scores), dtype=torch.float32)


def test_scores_of_latents_are_those_of_a_whole_unet_with_hooks(made, reward, latents):
    wanted = formula(made, latents, PROMPTS, [951, 300, 0, 1])
    scores = reward.of_latents(latents, PROMPTS, TIMES)
    assert scores.dtype == torch.float32 and wanted.std() > 0.1
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-4)


def test_a_finished_image_is_its_latents_at_time_0(made, reward):
    images, prompts = pictures(4), some(PROMPTS, 4)
    square = [image.convert("RGB").resize((64, 64), 3) for image in images]
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 127.5 - 1 for i in square])
    with torch.no_grad():
        z = reward.vae.encode(pixels).latent_dist.mean * (0.13025 if made.large else 0.18215)
    torch.testing.assert_close(reward.encode(images), z, rtol=0, atol=1e-5)
    scores = reward(images, prompts)
    torch.testing.assert_close(scores, reward.of_latents(z, prompts, torch.zeros(4)), rtol=0, atol=1e-4)
    torch.testing.assert_close(scores, formula(made, z, prompts, [0] * 4), rtol=0, atol=2e-4)


@covers("latent_reward")
def test_it_conforms(made, reward):
    # a random network and guidance of 7.5 make much of 8-bit rounding
    conforms(reward, PROMPTS, tolerance=0.4, differentiable=True)
    assert_bfloat16_keeps_the_order(made.spec, PROMPTS, correlation=0.95)


def test_latents_in_a_batch_score_as_they_do_alone(reward, latents):
    whole = replace(reward, batch_size=4).of_latents(latents, PROMPTS, TIMES)
    alone = [reward.of_latents(latents[i : i + 1], PROMPTS[i : i + 1], TIMES[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=5e-5)
    order = torch.tensor([2, 0, 3, 1])
    turned = reward.of_latents(latents[order], [PROMPTS[i] for i in order], TIMES[order])
    torch.testing.assert_close(turned, whole[order], rtol=0, atol=5e-5)
    assert reward.of_latents(latents[:0], [], TIMES[:0]).shape == (0,)


def test_the_gradient_by_latents_is_that_of_finite_differences(reward, latents):
    latents.requires_grad_()
    (gradient,) = torch.autograd.grad(reward.of_latents(latents, PROMPTS, TIMES).sum(), latents)
    direction = gradient / gradient.norm()  # where the slope is steepest, and rounding matters least
    step = 0.02
    with torch.no_grad():
        up, down = (reward.of_latents(latents + s * direction, PROMPTS, TIMES).sum() for s in (step, -step))
    assert float((up - down) / (2 * step)) == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_the_time_matters_and_it_is_not_one_of_clean_estimates(reward, latents):
    early, late = (reward.of_latents(latents, PROMPTS, torch.full((4,), t)) for t in (0.1, 0.9))
    assert (early - late).abs().min() > 1e-3
    assert not isinstance(reward, TimedReward)


def test_what_does_not_fit_is_named(reward, latents):
    with pytest.raises(ValueError, match=r"allowed: \(B, 4, h, w\)"):
        reward.of_latents(latents[:, :3], PROMPTS, TIMES)
    with pytest.raises(ValueError, match="3 prompts"):
        reward.of_latents(latents, PROMPTS[:3], TIMES)
    with pytest.raises(ValueError, match="allowed: times in"):
        reward.of_latents(latents, PROMPTS, TIMES + 0.5)


def test_the_way_up_is_thrown_away(made, reward):
    whole = sum(p.numel() for p in unet(made.large).parameters())
    assert sum(p.numel() for p in reward.unet.parameters()) < 0.6 * whole
    assert not any(p.requires_grad for p in reward.unet.parameters())


def test_other_models_are_refused(made, tmp_path):
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    spec = f"latent_reward:{tmp_path}@{made.base}"
    heads = torch.load(tmp_path / "state_dict.pt")
    torch.save({**heads, "visual_projection": {"weight": torch.zeros(12, 4800)}}, tmp_path / "state_dict.pt")
    with pytest.raises(
        UserError, match=r"visual_projection of .* is another model's.*weight \(it has \(12, 4800\)"
    ):
        rewards.load(spec)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state_dict.pt")
    with pytest.raises(UserError, match="no visual_projection, logit_scale"):
        rewards.load(spec)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=f"latent_reward='{empty}' cannot be loaded|has .* give its base"):
        rewards.load(f"latent_reward:{made.folder}@{empty}")
    shutil.rmtree(tmp_path / "unet")
    with pytest.raises(UserError, match=f"latent_reward='{tmp_path}' cannot be loaded"):
        rewards.load(spec)


def test_sources_say_what_is_allowed(tmp_path):
    for spec in ("latent_reward", "latent_reward:nothing", f"latent_reward:{tmp_path}"):
        with pytest.raises(UserError, match="allowed: latent_reward:sd15, latent_reward:sdxl"):
            rewards.load(spec)
    with pytest.raises(UserError, match=r"cannot fetch lrm_sd15/state_dict.pt of casiatao/LRM"):
        rewards.load("latent_reward:sd15")
