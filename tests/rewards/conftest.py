import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from diffalign.rewards.zoo.aesthetic import load_head
from tests.helpers import PUBLISHED_DATA
from tests.tiny_pipelines import tokenizer

SIZE = 28  # pixels of the vision tower


def make_clip(folder: Path, width: int = 16, seed: int = 0) -> Path:
    """Write a random CLIP in PickScore's layout: config.json, model.safetensors and a tokenizer."""
    words = tokenizer()
    towers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**towers, **ids, "vocab_size": len(words), "max_position_embeddings": 16},
        vision_config={**towers, "image_size": SIZE, "patch_size": 7},
        projection_dim=width,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():  # the default initialisation hardly tells images apart
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it was imported


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def photos():
    """Five images of different sizes and modes."""
    random = np.random.default_rng(0)
    sizes = [(40, 30), (28, 28), (64, 64), (31, 90), (33, 28)]
    images = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    smooth = [image.resize((8, 8)).resize(image.size, Image.Resampling.BICUBIC) for image in images]
    smooth[2] = smooth[2].convert("RGBA")
    smooth[4] = smooth[4].convert("L")
    return smooth


@pytest.fixture
def words():
    return [
        "a red cat",
        "a",
        "the long long long long long long long long prompt that is cut",
        "Red",
        "a blue dog",
    ]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def published_v2_head(folder: Path):
    """aesthetic_v2's published head, loaded from its own layout: five linear layers and nothing between them.

    Their product, an affine map of 768 numbers, is what is kept; the layers made here have that product.
    """
    affine = torch.from_numpy(np.load(PUBLISHED_DATA / "laion_aesthetic_v2" / "affine.npy")).float()
    state = {}
    for layer, (wide, narrow) in zip((0, 2, 4, 6, 7), pairwise((768, 1024, 128, 64, 16, 1)), strict=True):
        weight, bias = torch.zeros(narrow, wide), torch.zeros(narrow)
        weight[0] = affine[:-1] if layer == 0 else torch.eye(wide)[0]
        state |= {f"layers.{layer}.weight": weight, f"layers.{layer}.bias": bias}
    state["layers.7.bias"] += affine[-1]
    torch.save(state, folder / "head.pth")
    return load_head(folder / "head.pth", "aesthetic_v2")


def make_open_clip(quick_gelu: bool = False, head_width: int = 64, seed: int = 0):
    """Write a random open_clip CLIP of 28 x 28 pixels, 12 tokens of the real vocabulary and width 16."""
    open_clip = pytest.importorskip("open_clip")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(
            16,
            open_clip.CLIPVisionCfg(
                layers=3, width=128, head_width=head_width, patch_size=7, image_size=SIZE
            ),
            open_clip.CLIPTextCfg(context_length=12, vocab_size=49408, width=64, heads=1, layers=2),
            quick_gelu=quick_gelu,
        )
        for parameter in model.parameters():  # the default initialisation hardly tells images apart
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
