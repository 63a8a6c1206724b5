"""CLIPScore and heads over embeddings (LAION v2 with ReLU, Simulacra, v2.5) on tiny random checkpoints."""

import numpy as np
import pytest
import torch
from transformers import CLIPModel, SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.zoo.aesthetic import load_head, score_embeddings
from tests.rewards import conformance
from tests.rewards.conformance import as_pixels, conforms, covers, pictures
from tests.rewards.conftest import SIZE, published_v2_head

PROMPTS = ["a red cat", "a", "", "the long prompt that is cut " * 3, "Red", "a blue dog"]


def layers(path, prefix, numbers, width, dtype=torch.float32):
    """Write a head of five layers under ``prefix`` and these numbers; return its weights in order."""
    generator = torch.Generator().manual_seed(3)
    sizes = [width, 12, 8, 6, 4, 1]
    state, pairs = {}, []
    for number, inner, outer in zip(numbers, sizes, sizes[1:], strict=False):
        weight = (torch.randn(outer, inner, generator=generator) / 2).to(dtype)
        bias = torch.randn(outer, generator=generator).to(dtype)
        state |= {f"{prefix}{number}.weight": weight, f"{prefix}{number}.bias": bias}
        pairs.append((weight.float(), bias.float()))
    torch.save(state, path)
    return pairs


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory):
    """Return a random whole SigLIP, of which the reward reads the vision tower."""
    folder = tmp_path_factory.mktemp("siglip")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipModel(
            SiglipConfig(
                text_config={**tower, "vocab_size": 50, "max_position_embeddings": 8},
                vision_config={**tower, "image_size": SIZE, "patch_size": 7},
            )
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_spec(siglip_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "aesthetic_predictor_v2_5.pth"
    layers(path, "scoring_head.", (0, 2, 4, 6, 8), 16, torch.bfloat16)
    return f"aesthetic_v2_5:{path}@{siglip_folder}"


def cosines(clip_folder, reward, images, prompts):
    """Return the similarity by transformers itself, which normalises both."""
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        output = model(input_ids=reward.clip.tokens(prompts), pixel_values=reward.clip.inputs(images))
    return (output.image_embeds * output.text_embeds).sum(-1)


class TestClipScore:
    def test_it_is_a_hundred_cosines(self, clip_folder):
        reward = rewards.load(f"clipscore:{clip_folder}", batch_size=4)
        wanted = 100 * cosines(clip_folder, reward, pictures(), PROMPTS)
        torch.testing.assert_close(reward(pictures(), PROMPTS), wanted, rtol=0, atol=1e-4)
        assert (wanted < 0).any() and wanted.std() > 1

    def test_the_papers_is_an_option_away(self, clip_folder):
        spec = f"clipscore:{clip_folder}@scale=2.5@prefix=A photo depicts @clamp=yes"
        reward = rewards.load(spec)
        cosine = cosines(clip_folder, reward, pictures(), [f"A photo depicts {prompt}" for prompt in PROMPTS])
        torch.testing.assert_close(reward(pictures(), PROMPTS), 2.5 * cosine.clamp_min(0), rtol=0, atol=1e-5)
        assert (cosine < 0).any()
        plain = cosines(clip_folder, reward, pictures(), PROMPTS)
        assert (plain - cosine).abs().max() > 0.01  # the prefix is read

    @covers("clipscore")
    def test_it_conforms(self, clip_folder):
        reward = rewards.load(f"clipscore:{clip_folder}")
        spread = reward(pictures(), PROMPTS[:1] * 6).std().item()
        conforms(reward, PROMPTS, tolerance=spread / 10, differentiable=True)
        conformance.assert_bfloat16_keeps_the_order(f"clipscore:{clip_folder}", PROMPTS, correlation=0.95)

    def test_bad_options(self, clip_folder):
        with pytest.raises(UserError, match="'sclae'; did you mean scale"):
            rewards.load(f"clipscore:{clip_folder}@sclae=2")
        with pytest.raises(UserError, match="scale=two must be a number"):
            rewards.load("clipscore:scale=two")  # before a model is loaded
        with pytest.raises(UserError, match="cannot load 'openai/clip-vit-large-patch14'"):
            rewards.load("clipscore:scale=1")

    def test_a_prompt_with_a_mark_is_refused(self, clip_folder):
        with pytest.raises(UserError, match=r"holds <\|startoftext\|>, which is a mark of the tokenizer"):
            rewards.load(f"clipscore:{clip_folder}")(pictures(1), ["a <|STARTOFTEXT|> cat"])


class TestHeads:
    def test_the_relu_file_has_a_relu_between_its_layers(self, clip_folder, tmp_path):
        pairs = layers(tmp_path / "ava+logos-l14-reluMSE.pth", "layers.", (0, 3, 6, 9, 11), 16)
        x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
        wanted = x.double().numpy()
        for i, (weight, bias) in enumerate(pairs):
            wanted = wanted @ weight.double().numpy().T + bias.double().numpy()
            wanted = np.maximum(wanted, 0) if i < 4 else wanted
        found = score_embeddings(load_head(tmp_path / "ava+logos-l14-reluMSE.pth", "aesthetic_v2"), x)
        np.testing.assert_allclose(found, wanted[:, 0], rtol=1e-5, atol=1e-5)
        assert np.ptp(wanted) > 0.1
        reward = rewards.load(f"aesthetic_v2:{tmp_path / 'ava+logos-l14-reluMSE.pth'}@{clip_folder}")
        assert reward(pictures(), PROMPTS).shape == (6,)

    @covers("simulacra")
    def test_simulacra_reads_embeddings_of_the_length_of_their_root(self, clip_folder, tmp_path):
        generator = torch.Generator().manual_seed(2)
        weight, bias = torch.randn(1, 16, generator=generator), torch.tensor([5.0])
        path = tmp_path / "sac_public_2022_06_29_vit_l_14_linear.pth"
        torch.save({"linear.weight": weight, "linear.bias": bias}, path)
        reward = rewards.load(f"simulacra:{path}@{clip_folder}")
        model = CLIPModel.from_pretrained(clip_folder).eval()
        with torch.no_grad():
            features = model.get_image_features(reward.clip.inputs(pictures())).pooler_output
        wanted = (torch.nn.functional.normalize(features) * 16**0.5) @ weight[0] + bias
        torch.testing.assert_close(reward(pictures(), PROMPTS), wanted, rtol=1e-5, atol=1e-5)
        conforms(reward, PROMPTS, tolerance=wanted.std().item() / 10, differentiable=True)

    def test_heads_of_other_rewards_are_refused(self, clip_folder, tmp_path):
        torch.save({"weight": torch.zeros(1, 16), "bias": torch.zeros(1)}, tmp_path / "vit_l_14.pth")
        for name in ("simulacra", "aesthetic_v2", "aesthetic_v2_5"):
            with pytest.raises(UserError, match=f"{name!r}: .*is a head of aesthetic_v1 .one Linear"):
                rewards.load(f"{name}:{tmp_path / 'vit_l_14.pth'}@{clip_folder}")

    def test_simulacra_needs_its_head_and_knows_its_clip_by_the_file_name(self, tmp_path):
        with pytest.raises(UserError, match=r"needs its head. Give a head of crowsonkb"):
            rewards.load("simulacra")
        state = {"linear.weight": torch.zeros(1, 512), "linear.bias": torch.zeros(1)}
        torch.save(state, tmp_path / "sac_public_2022_06_29_vit_b_16_linear.pth")
        with pytest.raises(UserError, match="openai/clip-vit-base-patch16"):
            rewards.load(f"simulacra:{tmp_path / 'sac_public_2022_06_29_vit_b_16_linear.pth'}")
        torch.save(state, tmp_path / "head.pth")
        with pytest.raises(UserError, match=r"cannot tell the CLIP .* write simulacra:HEAD@BACKBONE"):
            rewards.load(f"simulacra:{tmp_path / 'head.pth'}")

    def test_the_published_head_is_affine(self, tmp_path):
        """v2's published head is affine: |w| = 17.996, b = 5.2366."""
        head = published_v2_head(tmp_path)
        zero = torch.zeros(1, 768)
        slope = torch.autograd.functional.jacobian(lambda x: score_embeddings(head, x), zero).flatten()
        assert slope.norm().item() == pytest.approx(17.996, abs=1e-3)
        assert score_embeddings(head, zero).item() == pytest.approx(5.2366, abs=1e-4)


class TestSiglip:
    def test_it_is_the_head_on_the_unit_pooled_output(self, siglip_folder, siglip_spec, tmp_path):
        pairs = layers(tmp_path / "again.pth", "scoring_head.", (0, 2, 4, 6, 8), 16, torch.bfloat16)
        processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
        pixels = processor([i.convert("RGB") for i in pictures()], return_tensors="pt").pixel_values
        with torch.no_grad():
            pooled = SiglipModel.from_pretrained(siglip_folder).eval().vision_model(pixels).pooler_output
        x = pooled.double() / pooled.double().norm(dim=1, keepdim=True)
        for weight, bias in pairs:
            x = x @ weight.double().T + bias.double()
        found = rewards.load(siglip_spec, batch_size=4)(pictures(), PROMPTS)
        torch.testing.assert_close(found, x[:, 0].float(), rtol=1e-5, atol=1e-5)
        assert found.std() > 0.05

    @covers("aesthetic_v2_5")
    def test_it_conforms(self, siglip_spec):
        reward = rewards.load(siglip_spec)
        spread = reward(pictures(), PROMPTS).std().item()
        conforms(reward, PROMPTS, tolerance=spread / 10, differentiable=True)
        conformance.assert_bfloat16_keeps_the_order(siglip_spec, PROMPTS, correlation=0.9)

    def test_nothing_is_cropped(self, siglip_spec):
        reward = rewards.load(siglip_spec)
        wide = pictures()[3]
        pixels = as_pixels(wide).requires_grad_()
        reward(pixels, [""]).sum().backward()
        assert (pixels.grad[0].abs().sum((0, 1)) > 0).all() and (pixels.grad[0].abs().sum((0, 2)) > 0).all()

    def test_bad_sources(self, siglip_folder, siglip_spec, clip_folder, tmp_path):
        with pytest.raises(UserError, match=r"needs its head.* under the AGPL"):
            rewards.load("aesthetic_v2_5")
        head = siglip_spec.removeprefix("aesthetic_v2_5:").partition("@")[0]
        with pytest.raises(UserError, match="SiglipVisionModel"):
            rewards.load(f"aesthetic_v2_5:{head}@{clip_folder}")
        with pytest.raises(UserError, match="cannot load 'google/siglip-so400m-patch14-384'"):
            rewards.load(f"aesthetic_v2_5:{head}")
        layers(tmp_path / "wide.pth", "scoring_head.", (0, 2, 4, 6, 8), 24)
        with pytest.raises(UserError, match=r"takes embeddings of 24 numbers, but .* makes 16"):
            rewards.load(f"aesthetic_v2_5:{tmp_path / 'wide.pth'}@{siglip_folder}")
