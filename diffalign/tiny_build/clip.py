"""Train a tiny CLIP in PickScore's format on drawn scenes.

Score = exp(logit_scale) * cosine, as in Pick-a-Pic (arXiv 2305.01569). The loss is CLIP's contrastive loss
plus PickScore's objective, the logistic loss of the correct render against the same layout with one wrong
word. It is trained on correct captions, unlike the base models.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffalign.tiny.scenes import alter, caption, render, sample_scene
from diffalign.tiny_build import networks, text
from diffalign.tiny_build.autoencoder import to_tensor

Say = Callable[[str], None]


def draw(count: int, rng: np.random.Generator, split: str = "train") -> tuple[Tensor, Tensor, list[str]]:
    """Draw correct and wrong images (N, 3, 32, 32) in [-1, 1], and captions."""
    right, wrong, texts = [], [], []
    for _ in range(count):
        scene = sample_scene(rng, split)
        right.append(np.asarray(render(scene)))
        wrong.append(np.asarray(render(alter(scene, rng))))
        texts.append(caption(scene))
    return to_tensor(np.stack(right)), to_tensor(np.stack(wrong)), texts


def _ids(tok: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tok(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def embed(model: CLIPModel, ids: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit text and image embeddings (B, 64) of token ids (B, 32) and pixels (N, 3, 32, 32)."""
    texts = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    images = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return F.normalize(texts, dim=-1), F.normalize(images, dim=-1)


def train(
    seconds: float, seed: int, say: Say, count: int = 16000
) -> tuple[CLIPModel, CLIPTokenizer, dict[str, float]]:
    """Train for `seconds`; return model, tokenizer and figures for the report."""
    torch.manual_seed(seed)
    tok = text.tokenizer()
    model = networks.clip(tok)
    right, wrong, texts = draw(count, np.random.default_rng(seed))
    ids = _ids(tok, texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.02, betas=(0.9, 0.98))
    start, step, half = time.monotonic(), 0, 64
    while (done := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 200) * (0.5 + 0.5 * np.cos(np.pi * done))
        i = torch.randint(count, (half,))
        noise = torch.randn(2 * half, 3, 1, 1) * 0.03 + torch.randn(2 * half, 3, 32, 32) * 0.03
        text_embeddings, image_embeddings = embed(model, ids[i], torch.cat([right[i], wrong[i]]) + noise)
        # (texts, correct then wrong images)
        scores = model.logit_scale.exp() * text_embeddings @ image_embeddings.T
        chosen = scores.diagonal()
        rejected = scores[:, half:].diagonal()
        target = torch.arange(half)
        contrast = F.cross_entropy(scores, target) + F.cross_entropy(scores[:, :half].T, target)
        loss = contrast / 2 + F.softplus(rejected - chosen).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=float(np.log(100)))
        step += 1
        if step % 200 == 0:
            say(f"clip step {step} loss {loss.item():.3f} {time.monotonic() - start:.0f} s of {seconds:.0f}")
    model.eval()
    figures = {"steps": step, "seconds": round(time.monotonic() - start, 1), **measure(model, tok, seed + 1)}
    return model, tok, figures


@torch.no_grad()
def measure(model: CLIPModel, tok: CLIPTokenizer, seed: int, count: int = 2000) -> dict[str, float]:
    """Return the accuracy on held-out pairs of a correct image and the same layout with one wrong word."""
    right, wrong, texts = draw(count, np.random.default_rng(seed), "validation")
    captions, good = embed(model, _ids(tok, texts), right)
    bad = F.normalize(model.visual_projection(model.vision_model(pixel_values=wrong).pooler_output), dim=-1)
    wins = ((captions * good).sum(-1) > (captions * bad).sum(-1)).float()
    return {
        "pair_accuracy": round(float(wins.mean()), 4),
        "logit_scale": round(float(model.logit_scale.exp()), 2),
    }


def save(model: CLIPModel, tok: CLIPTokenizer, folder: Path) -> None:
    """Write a folder that transformers' CLIP classes load."""
    model.save_pretrained(folder)
    text.save(tok, folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(folder)
