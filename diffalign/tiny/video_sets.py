"""Preference pairs of moving shapes, drawn as they are read, with labels for every half second and of all.

A frame in which a thing has a defect is bad; a segment's score is the share of its frames that are not, a
video's score the share of all. In ``video_pairs`` both videos show the same motion, as DenseDPO's pairs do,
and each has defects at times of its own. In ``video_takes`` they are independent clips of one caption, as
samples of a model are, with one label: the faster a thing moves, the likelier it has a defect, so that the
winners are slow.
"""

import io
from typing import Any

import numpy as np
from PIL import Image

from diffalign.tiny.motions import FPS, FRAMES, Clip, clip_of, corpus_clip, defective, render

SECONDS = 0.5  # of a segment
FLAWLESS = 0.4  # share of the pairs of one motion of which one video has no defect
Row = dict[str, Any]


def encode(frames: np.ndarray) -> bytes:
    """Frames uint8 (F, H, W, 3) as an animated PNG: without loss, read by PyAV."""
    out = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(out, "PNG", save_all=True, append_images=rest, duration=round(1000 / FPS), loop=0)
    return out.getvalue()


def good_frames(clip: Clip) -> np.ndarray:
    """Whether each frame is free of defects, (F,)."""
    good = np.ones(FRAMES, dtype=bool)
    for defect in clip.defects:
        good[defect.start : defect.start + defect.frames] = False
    return good


def segments_of(good: np.ndarray) -> list[float]:
    """Return the share of good frames of each half second; the last of them is shorter."""
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
    """Two videos of one motion."""
    true = clip_of(text, rng)
    clips = [defective(true, rng, int(rng.integers(len(true.movers)))) for _ in range(2)]
    if rng.random() < FLAWLESS:
        clips[int(rng.integers(2))] = true
    return _row(text, clips)


def two_takes(text: str, rng: np.random.Generator) -> Row:
    """Two clips of one caption, with one label."""
    row = _row(text, [corpus_clip(text, rng) for _ in range(2)])
    return {name: row[name] for name in ("prompt", "videos", "scores")}
