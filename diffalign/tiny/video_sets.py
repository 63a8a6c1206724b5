"""Preference pairs of moving shapes, drawn on the fly, with labels of half-second segments and of videos.

The score of a segment, or of a video, is the share of its frames without a defect. In ``video_pairs`` both
videos show the same motion, as DenseDPO's pairs do, with defects at different times. In ``video_takes`` they
are independent clips of one caption, like samples of a model, with one label; since fast things are likelier
to have a defect, the winners are slow.
"""

import io
from typing import Any

import numpy as np
from PIL import Image

from diffalign.tiny.motions import FPS, FRAMES, Clip, clip_of, corpus_clip, defective, render

SECONDS = 0.5  # length of a segment
FLAWLESS = 0.4  # share of ``video_pairs`` in which one video has no defect
Row = dict[str, Any]


def encode(frames: np.ndarray) -> bytes:
    """Return frames (F, H, W, 3), uint8, as an animated PNG, which is lossless and readable by PyAV."""
    out = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(out, "PNG", save_all=True, append_images=rest, duration=round(1000 / FPS), loop=0)
    return out.getvalue()


def good_frames(clip: Clip) -> np.ndarray:
    """Return for each frame, (F,), whether it has no defect."""
    good = np.ones(FRAMES, dtype=bool)
    for defect in clip.defects:
        good[defect.start : defect.start + defect.frames] = False
    return good


def segments_of(good: np.ndarray) -> list[float]:
    """Return the share of good frames of each half second; the last segment is shorter."""
    at = (np.arange(len(good)) / FPS / SECONDS).astype(int)
    return [round(float(good[at == k].mean()), 4) for k in range(at[-1] + 1)]


def _row(text: str, clips: list[Clip]) -> Row:
    good = [good_frames(clip) for clip in clips]
    return {
        "prompt": text,
        "videos": [encode(render(clip)) for clip in clips],
        "scores": [round(float(g.mean()), 4) for g in good],
        "segments": [segments_of(g) for g in good],
        "segment_seconds": SECONDS,
    }


def same_motion(text: str, rng: np.random.Generator) -> Row:
    """Return a pair of videos of one motion, with segment labels."""
    true = clip_of(text, rng)
    clips = [defective(true, rng, int(rng.integers(len(true.movers)))) for _ in range(2)]
    if rng.random() < FLAWLESS:
        clips[int(rng.integers(2))] = true
    return _row(text, clips)


def two_takes(text: str, rng: np.random.Generator) -> Row:
    """Return a pair of independent clips of one caption, with one label."""
    row = _row(text, [corpus_clip(text, rng) for _ in range(2)])
    return {name: row[name] for name in ("prompt", "videos", "scores")}
