"""Make the base of the benchmark of edits, its preference pairs, and the scores of its held-out edits.

The base is a tiny FLUX.1 Kontext, trained once on drawn edits of which a share is wrong. It and the pairs lie
under ``runs/benchmarks/edits``; an interrupted training of the base resumes.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import record
from diffalign import tiny
from diffalign.config.schema import ModelConfig, Run
from diffalign.evaluation.drawing.pipeline import fingerprint
from diffalign.evaluation.drawing.sampling import SamplingSettings, generate
from diffalign.export.aligned import load_aligned
from diffalign.media.sourced import SourcedPrompt
from diffalign.models.loading import load
from diffalign.runs.align import align
from diffalign.runs.demo import EVALUATION_SEED
from diffalign.tiny import edits
from diffalign.tiny.edits import Edit
from diffalign.tiny.scenes import caption, render
from diffalign.tiny.sets import png
from diffalign.tiny_build import autoencoder, kontext, saving, sd3
from diffalign.tiny_build.flow_training import Plan
from diffalign.utils.files import write_atomic

MINUTES, SEED = 18.0, 0  # of one CPU core, for the base
PAIRS = 1000  # edits of the train split that pairs are made of
SAMPLES = 4  # of the base for each of these edits, where it draws the pairs itself
STEPS = 10  # sampling steps
SAMPLE_SEED = 1
BATCH = 64  # edits drawn at once
SAMPLING = SamplingSettings(
    num_inference_steps=STEPS, height=32, width=32, max_sequence_length=kontext.TOKENS
)
JUDGE, FOLLOWED, UNTOUCHED, KEPT = "judge", "followed", "untouched", "kept"
SCORES = (JUDGE, FOLLOWED, UNTOUCHED, KEPT)

Scores = dict[str, list[float]]


def folder() -> Path:
    """Return the folder of base and pairs."""
    return record.WORK / "edits"


def model() -> ModelConfig:
    """Return the base as a run's section, training it if needed."""
    return ModelConfig(path=str(base()), max_sequence_length=kontext.TOKENS)


def base() -> Path:
    """Return the folder of the base's pipeline; it is trained if it is missing."""
    facts = [SEED, MINUTES, kontext.BATCH, kontext.RATE, kontext.COUNT, kontext.WRONG, kontext.KINDS]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=4).hexdigest()
    where = folder() / f"base-{digest}"
    keep = where.with_name(f"{where.name}.partial.pt")
    with record.lock("edits-base"):
        if not where.exists():
            where.parent.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(SEED)
            vae, parts = sd3.centred(tiny.WEIGHTS / "vae"), kontext.Parts()
            figures = kontext.train(parts, vae, Plan(60 * MINUTES, kontext.RATE, keep, SEED), saving.say)
            write_atomic(where.with_name(f"{where.name}.json"), json.dumps(figures))
            saving.save_pipeline(kontext.pipeline(parts, vae), where)
            keep.unlink(missing_ok=True)
    return where


def held(count: int, split: str = "test") -> list[Edit]:
    """Return the first held-out edits of a split."""
    return edits.held_out(count, split, kinds=kontext.KINDS)


def prompt_of(edit: Edit) -> SourcedPrompt:
    """Return the instruction of an edit with its source image."""
    return SourcedPrompt(edit.instruction, png(render(edit.source)))


def scores(images: Sequence[Image.Image], of: Sequence[Edit]) -> Scores:
    """Return the scores of an image of each edit, in [0, 1].

    ``judge``: statements of the target's caption that hold. ``followed``: whether the edited thing shows the
    new value. ``untouched``: whether the other thing is where and what it was. ``kept``: pixels outside the
    edit, as the source has them.
    """
    both = list(zip(images, of, strict=True))
    table = {
        JUDGE: [edits.right(image, caption(edit.source), edit.instruction) for image, edit in both],
        FOLLOWED: [edits.followed(image, edit) for image, edit in both],
        UNTOUCHED: [edits.untouched(image, edit) for image, edit in both],
        KEPT: [edits.kept(image, edit) for image, edit in both],
    }
    return {name: [round(float(value), 4) for value in values] for name, values in table.items()}


def drawn(pipeline: Any, of: Sequence[Edit], seed: int, samples: int = 1) -> list[Image.Image]:
    """Return ``samples`` images of each edit, those of an edit together; they depend on edit and seed."""
    found = generate(
        pipeline,
        [prompt_of(edit) for edit in of],
        SAMPLING,
        images_per_prompt=samples,
        seed=seed,
        batch_size=BATCH,
        progress=False,
    )
    return [sample.image for sample in found]


def judged(pipeline: Any, prompts: int, split: str = "test") -> Scores:
    """Return the scores of a pipeline's images of the first held-out edits of a split."""
    of = held(prompts, split)
    return scores(drawn(pipeline, of, EVALUATION_SEED), of)


def ceiling(prompts: int) -> Scores:
    """Return the scores of the correct targets, encoded and decoded by the autoencoder."""
    of = held(prompts)
    vae = sd3.centred(tiny.WEIGHTS / "vae")
    pixels = autoencoder.to_tensor(np.stack([np.asarray(render(edit.target)) for edit in of]))
    with torch.no_grad():
        decoded = vae.decode(autoencoder.encode(vae, pixels)).sample.clamp(-1, 1)
    levels = ((decoded.permute(0, 2, 3, 1) / 2 + 0.5) * 255).round().to(torch.uint8).numpy()
    return scores([Image.fromarray(one) for one in levels], of)


def written(rows: Iterable[Mapping[str, Any]], where: Path) -> Path:
    """Write rows with a prompt and PNG bytes as ``pairs.jsonl``, its images beside it; return the file."""
    where.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        line = {"prompt": row["prompt"]}
        for name in ("source", "chosen", "rejected"):
            line[name] = f"{number}-{name}.png"
            (where / line[name]).write_bytes(row[name])
        lines.append(json.dumps(line) + "\n")
    path = where / "pairs.jsonl"
    write_atomic(path, "".join(lines))
    return path


@lru_cache
def pairs(own: bool) -> Path:
    """Return the file of the preference pairs of train edits, making it if it is missing.

    Args:
        own: pairs of the base's own images, ranked by the judge; False: renders of correct and wrong results.
    """
    start = load(model()).pipeline if own else None
    kind = f"own-{SAMPLES}-{fingerprint(start)[:8]}" if own else "renders"
    where = folder() / f"{kind}-{PAIRS}"
    with record.lock(where.name):
        if not (where / "pairs.jsonl").exists():
            written(edits.rows(PAIRS, kinds=kontext.KINDS) if start is None else ranked(start, PAIRS), where)
    return where / "pairs.jsonl"


def count(path: str) -> int:
    """Return the number of pairs of a file."""
    return len(Path(path).read_text(encoding="utf-8").splitlines())


def ranked(pipeline: Any, count: int) -> list[dict[str, Any]]:
    """Return the best and the worst of some samples of each train edit, by the judge.

    Edits whose samples all have one score are left out. Of equal samples the first counts.
    """
    rngs = [np.random.default_rng((SAMPLE_SEED, number)) for number in range(count)]
    asked = [edits.sample(rng, "train", kontext.KINDS) for rng in rngs]
    images, rows = drawn(pipeline, asked, SAMPLE_SEED, SAMPLES), []
    for number, edit in enumerate(asked):
        rivals = images[number * SAMPLES : (number + 1) * SAMPLES]
        values = [edits.right(image, caption(edit.source), edit.instruction) for image in rivals]
        if max(values) > min(values):
            best, worst = (rivals[values.index(pick(values))] for pick in (max, min))
            prompt = prompt_of(edit)
            rows.append(
                {"prompt": str(prompt), "source": prompt.content, "chosen": png(best), "rejected": png(worst)}
            )
    return rows


def trained(run: Run, prompts: int, split: str = "test") -> dict[str, Any]:
    """Train a run and return the scores of its held-out edits, its verdict and its CPU seconds."""
    begin = time.process_time()
    result = align(run, lambda line: None)
    seconds = time.process_time() - begin
    if result.aligned is None:
        raise KeyboardInterrupt
    pipeline = load_aligned(run.model, result.aligned)
    pipeline.fuse_lora()
    row = {
        "seconds": round(seconds, 1),
        "verdict": result.verdict,
        "scores": judged(pipeline, prompts, split),
    }
    shutil.rmtree(result.output)
    return row
