"""PickScore and the aesthetic heads against transformers' own computation, on a tiny random CLIP."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Crop, resized
from diffalign.rewards.zoo.aesthetic import load_head, score_embeddings
from tests.helpers import PUBLISHED_DATA
from tests.rewards.conftest import SIZE, make_clip, published_v2_head

V1 = PUBLISHED_DATA / "laion_aesthetic_v1"


def as_pixels(images):
    return (
        torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) for i in images]).float()
        / 255
    )


def processed(images):
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return processor([i.convert("RGB") for i in images], return_tensors="pt").pixel_values


def network_input(images):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_MEAN, OPENAI_STD))
    return (Crop(SIZE).pil(images) - mean) / std


def test_the_pil_path_is_the_processors_to_the_bit(photos):
    torch.testing.assert_close(network_input(photos), processed(photos), rtol=0, atol=1e-6)


def test_the_long_side_is_rounded_down():
    assert resized(884, 1548, 224) == (224, 392)
    assert resized(300, 200, 224) == (336, 224)
    assert resized(347, 224, 224) == (347, 224)


def test_the_tensor_path_is_the_pil_path_but_for_rounding(photos):
    for photo in photos:
        exact, smooth = Crop(SIZE).pil([photo]), Crop(SIZE).pixels(as_pixels([photo]))
        assert (
            exact - smooth
        ).abs().max() < 0.005  # half a grey level is 0.002, twice: Pillow rounds each axis


def test_pixels_at_the_towers_size_are_not_resampled():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    torch.testing.assert_close(Crop(SIZE).pil([image]), Crop(SIZE).pixels(as_pixels([image])))


def test_pickscore_is_the_models_own_logit(clip_folder, photos, words):
    reward = rewards.load(f"pickscore:{clip_folder}")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = reward.clip.tokenizer(words, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=processed(photos)).logits_per_image.diagonal()
    torch.testing.assert_close(reward(photos, words), logits, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.5  # else the comparison says nothing


def test_the_checkpoints_own_colours_are_used(tmp_path, photos, words):
    folder = make_clip(tmp_path)
    openai = rewards.load(f"pickscore:{folder}")(photos, words)
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    reward = rewards.load(f"pickscore:{folder}")
    inputs = Crop(SIZE).pil(photos) * 2 - 1
    with torch.no_grad():
        looks = reward.clip.model.get_image_features(inputs).pooler_output
    texts = reward.clip.text_embeddings(words)
    expected = reward.clip.scale * (torch.nn.functional.normalize(looks) * texts).sum(-1)
    torch.testing.assert_close(reward(photos, words), expected)
    assert not torch.allclose(openai, expected, atol=1e-2)


@pytest.mark.parametrize("name", ["pickscore", "tiny_clip"])
def test_a_batch_is_its_images_one_by_one(clip_folder, photos, words, name):
    reward = rewards.load(f"{name}:{clip_folder}", batch_size=2)
    together = reward(photos, words)
    alone = [reward([photo], [word]) for photo, word in zip(photos, words, strict=True)]
    assert together.shape == (5,) and together.dtype == torch.float32
    assert all(score.shape == (1,) for score in alone)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reward(photos[::-1], words[::-1]).flip(0), together, rtol=1e-5, atol=1e-5)
    assert reward([], []).shape == (0,)


def test_gradients_reach_pixels_and_are_right(clip_folder):
    reward = rewards.load(f"pickscore:{clip_folder}")
    pixels = torch.rand(1, 3, 40, 36, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    pixels.requires_grad_()
    reward(pixels, ["a red cat"]).sum().backward()
    direction = torch.sign(pixels.grad)
    step = 1e-3
    with torch.no_grad():
        up, down = (reward(pixels + s * step * direction, ["a red cat"]).item() for s in (1, -1))
    assert (up - down) / (2 * step) == pytest.approx(pixels.grad.abs().sum().item(), rel=0.02)
    assert all(p.grad is None for p in reward.clip.model.parameters())


def test_bfloat16_keeps_float32_scores_and_their_order(clip_folder, photos, words):
    exact, rough = (
        rewards.load(f"pickscore:{clip_folder}", dtype=d)(photos, words) for d in ("float32", "bfloat16")
    )
    assert rough.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.99


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_scale_of_the_cosine_is_not_rounded(clip_folder, photos, dtype):
    exact, rough = (rewards.load(f"pickscore:{clip_folder}", dtype=d).clip for d in ("float32", dtype))
    assert torch.equal(rough.scale, exact.scale)
    assert rough.inputs(photos).dtype == rough.dtype == getattr(torch, dtype)
    assert {p.dtype for name, p in rough.model.named_parameters() if name != "logit_scale"} == {rough.dtype}


def test_real_aesthetic_heads_give_their_published_values(tmp_path):
    levels = [0, 2, 4, 6, 8]
    unit = torch.cat([torch.from_numpy(np.load(V1 / f"vit_l_14_embeddings/rating{i}.npy")) for i in levels])
    v2 = score_embeddings(published_v2_head(tmp_path), unit)
    torch.testing.assert_close(v2, torch.tensor([1.655, 3.070, 4.238, 5.073, 5.577]), rtol=0, atol=1e-3)
    v1 = score_embeddings(load_head(V1 / "sa_0_4_vit_l_14_linear.pth", "aesthetic_v1"), unit)
    torch.testing.assert_close(v1, torch.tensor([-2.458, 1.895, 5.100, 7.787, 10.226]), rtol=0, atol=1e-3)
    small = torch.cat(
        [torch.from_numpy(np.load(V1 / f"vit_b_32_embeddings/rating{i}.npy")) for i in range(3)]
    )
    b32 = score_embeddings(load_head(V1 / "sa_0_4_vit_b_32_linear.pth", "aesthetic_v1"), small)
    torch.testing.assert_close(b32, torch.tensor([-1.470, 0.273, 1.990]), rtol=0, atol=1e-3)


def test_aesthetic_is_its_head_on_unit_embeddings(clip_folder, photos, words, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(1, 16, generator=generator), torch.tensor([5.0])
    torch.save({"weight": weight, "bias": bias}, tmp_path / "linear.pth")
    reward = rewards.load(f"aesthetic_v1:{tmp_path / 'linear.pth'}@{clip_folder}", batch_size=2)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        features = model.get_image_features(processed(photos)).pooler_output
    expected = (features / features.norm(dim=1, keepdim=True)) @ weight[0] + bias
    torch.testing.assert_close(reward(photos, words), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reward(photos, words[::-1]), expected, rtol=1e-5, atol=1e-5)


def test_the_second_head_is_five_layers(clip_folder, tmp_path):
    sizes = [(0, 8, 16), (2, 6, 8), (4, 5, 6), (6, 4, 5), (7, 1, 4)]
    generator = torch.Generator().manual_seed(0)
    state = {f"layers.{i}.weight": torch.randn(o, n, generator=generator) for i, o, n in sizes}
    state |= {f"layers.{i}.bias": torch.randn(o, generator=generator) for i, o, _ in sizes}
    torch.save(state, tmp_path / "head.pth")
    x = torch.randn(3, 16, generator=generator)
    expected = x
    for i, _, _ in sizes:
        expected = expected @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    torch.testing.assert_close(
        score_embeddings(load_head(tmp_path / "head.pth", "aesthetic_v2"), x), expected[:, 0]
    )


class TestBadCheckpoints:
    def refuse(self, spec, *words):
        with pytest.raises(UserError) as error:
            rewards.load(str(spec))
        for word in words:
            assert word in str(error.value), str(error.value)

    def test_no_such_folder(self):
        self.refuse("pickscore:/no/such/folder", "/no/such/folder", "folder")

    def test_the_hub_cannot_be_reached(self):
        self.refuse("pickscore", "yuvalkirstain/PickScore_v1", "hub", "pickscore:FOLDER")

    def test_an_empty_folder(self, tmp_path):
        self.refuse(f"pickscore:{tmp_path}", "config.json")

    def test_a_file(self, tmp_path):
        (tmp_path / "x.bin").write_text("")
        self.refuse(f"pickscore:{tmp_path / 'x.bin'}", "is a file")

    def test_weights_that_are_missing(self, tmp_path):
        from safetensors.torch import load_file, save_file

        file = make_clip(tmp_path) / "model.safetensors"
        state = load_file(file)
        del state["visual_projection.weight"]
        save_file(state, file, {"format": "pt"})
        self.refuse(f"pickscore:{tmp_path}", "not a whole CLIP", "visual_projection.weight")

    def test_weights_that_are_no_safetensors(self, tmp_path):
        (make_clip(tmp_path) / "model.safetensors").write_bytes(b"nothing")
        self.refuse(f"pickscore:{tmp_path}", "cannot load", str(tmp_path))

    def test_another_model(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
        self.refuse(f"pickscore:{tmp_path}", str(tmp_path))

    def test_heads(self, tmp_path, clip_folder):
        self.refuse("aesthetic_v1", "needs its head")
        self.refuse("aesthetic_v2:/no/head.pth", "/no/head.pth")
        bad = tmp_path / "vit_l_14.pth"
        bad.write_bytes(b"not a checkpoint")
        self.refuse(f"aesthetic_v2:{bad}", "not a checkpoint of plain tensors")
        torch.save([1], bad)
        self.refuse(f"aesthetic_v2:{bad}", "it is a list")
        torch.save({"layers.0.weight": torch.zeros(1), "layers.3.weight": torch.zeros(1)}, bad)
        self.refuse(f"aesthetic_v2:{bad}", "layers.3.weight", "linearMSE")
        torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, bad)
        self.refuse(f"aesthetic_v1:{bad}@{clip_folder}", "768", "16")
        torch.save({"weight": torch.zeros(1, 512), "bias": torch.zeros(1)}, tmp_path / "head.pth")
        self.refuse(f"aesthetic_v1:{tmp_path / 'head.pth'}", "vit_l_14", "HEAD@BACKBONE")


def test_pickscore_at_a_scale_is_that_times_the_cosine(clip_folder, photos, words):
    own, plain = (rewards.load(f"pickscore:{clip_folder}{option}") for option in ("", "@scale=1"))
    torch.testing.assert_close(plain(photos, words) * own.clip.scale, own(photos, words))
    assert plain(photos, words).abs().max() <= 1
    with pytest.raises(UserError, match="scale=big must be a number"):
        rewards.load(f"pickscore:{clip_folder}@scale=big")
