"""Figures of samples: densities on the plane, and images of the base and of an aligned model side by side."""

import base64
import io
import json
import textwrap

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import methods, plane_world, record, tiny_world
from diffalign.config.schema import ModelConfig
from diffalign.models.loading import load
from diffalign.plane.plane import LABELS, denoiser_of, points
from diffalign.plane.settings import PlaneRow

POINTS = 900  # points of each label and panel
EXTENT, BINS = 3.2, 72  # half width of the plotted square, and bins a side
COLOURS = 32  # colours of a density's palette, for small files
CAPTION_WIDTH = 19  # characters of a line above an image


def images(world: str, method: str) -> bytes:
    """Return a PNG of images of the base and of the aligned model, from the same noise, with their scores.

    The captions are the first of the test split. The model is that of the method's first row: tuned if the
    method has all its trials, else trained by its recipe as shipped.
    """
    name, recipe, tuned = methods.planned(world, method, 0, tuned=True)
    how = tiny_world.measures_of(recipe.model)
    texts = how.prompts("test", tiny_world.STRIP)
    before = tiny_world.sampled(load(ModelConfig(recipe.model.path)).pipeline, texts)
    strips = {
        "base": before,
        f"{method}\n{'tuned' if tuned else 'as shipped'}": tiny_world.strip(name, recipe),
    }
    figure, axes = plt.subplots(2, len(texts), figsize=(6.6, 2.9), layout="constrained")
    for line, (label, strip) in zip(axes, strips.items(), strict=True):
        scores = tiny_world.scored(strip, texts, how.rewards[:1])[how.rewards[0]]
        for axis, image, score in zip(line, strip, scores, strict=True):
            axis.imshow(np.asarray(image), interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
            axis.spines[:].set_visible(False)
            axis.set_xlabel(f"{score:.2f}", fontsize=7, labelpad=2)
        line[0].set_ylabel(label, fontsize=8)
    for axis, text in zip(axes[0], texts, strict=True):
        axis.set_title(textwrap.fill(text, CAPTION_WIDTH), fontsize=6.5)
    return _small(figure, colours=128)


def plane(row: PlaneRow, seed: int = 0) -> bytes:
    """Return a PNG of the densities of the base, the aligned model and the optimum of the same reward.

    The row is trained for as many steps as in the tests, so that methods that overshoot are stopped in time.
    """
    world = plane_world.PLANE
    start = plane_world.base_of(row)
    network = row.trained(start, None if row.rollout else plane_world.drawn(row.data, seed), seed)
    before, after = (points(denoiser_of(n), POINTS, plane_world.NOISE) for n in (start, network))
    draws = torch.Generator().manual_seed(seed)
    best = []
    for label in range(LABELS):
        tau = world.temperature(label, float(world.reward(after[label]).mean()))
        target = world.data(label) if np.isinf(tau) else world.optimum(label, tau)
        best.append(target.points(POINTS, draws))
    panels = {"base": before, "aligned": after, "optimum of the same reward": torch.stack(best)}
    figure, axes = plt.subplots(1, 3, figsize=(6, 2.2), layout="constrained")
    for axis, (title, samples) in zip(axes, panels.items(), strict=True):
        x, y = samples.flatten(0, 1).T.numpy()
        span = [[-EXTENT, EXTENT]] * 2
        axis.hist2d(x, y, bins=BINS, range=span, cmap="magma_r", vmax=POINTS * LABELS / 180)
        axis.set_title(f"{title}: {float(world.reward(samples.flatten(0, 1)).mean()):+.2f}", fontsize=8)
        axis.set_xticks([]), axis.set_yticks([])
        axis.set_aspect("equal")
    return _small(figure)


def of_notebook(name: str, number: int) -> bytes:
    """Return a PNG of the picture of that number, from 0, among the outputs that a notebook is saved with."""
    cells = json.loads((record.HERE.parent / "notebooks" / f"{name}.ipynb").read_text("utf-8"))["cells"]
    data = (output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    pictures = [found["image/png"] for found in data if "image/png" in found]
    return base64.b64decode("".join(pictures[number]))


def _small(figure: Figure, colours: int = COLOURS) -> bytes:
    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(colours).save(out, "png", optimize=True)
    return out.getvalue()
