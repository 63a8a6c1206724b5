"""Preference pairs of drawn scenes in Pick-a-Pic's schema.

The winner of a pair is a correct render of its caption. The loser has the same layout with one or two words
wrong. Style and background are equal, so labels carry no information about taste. A few pairs are ties: two
correct renders.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from diffalign.tiny.scenes import alter, render, scene_of, split_captions

TIES, TWO_WRONG = 0.03, 0.35  # shares of the pairs


def encode(image: Image.Image) -> bytes:
    """Return PNG bytes with an optimal palette; these images have few colours, so no loss is visible."""
    out = io.BytesIO()
    image.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        out, "PNG", optimize=True
    )
    return out.getvalue()


def _uid(*parts: object) -> str:
    digest = hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()
    return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:]))


def rows(count: int, seed: int) -> list[dict[str, object]]:
    """Return `count` rows with captions of the train split; the winner's position is random."""
    rng = np.random.default_rng(seed)
    texts = split_captions("train")
    order = [texts[i] for _ in range(-(-count // len(texts))) for i in rng.permutation(len(texts))][:count]
    uses = {t: order.count(t) for t in set(order)}
    out = []
    for number, text in enumerate(order):
        true = scene_of(text, rng)
        tie = bool(rng.random() < TIES)
        other = scene_of(text, rng, vivid=true.vivid, dark=true.dark) if tie else alter(true, rng)
        if not tie and rng.random() < TWO_WRONG:
            other = alter(other, rng)
            other = alter(true, rng) if other == true else other
        place = int(rng.integers(2))
        images = [encode(render(s)) for s in ((true, other) if place == 0 else (other, true))]
        uids = [_uid(seed, number, side) for side in (0, 1)]
        labels = (0.5, 0.5) if tie else (1.0 - place, float(place))
        out.append(
            {
                "caption": text,
                "jpg_0": images[0],
                "jpg_1": images[1],
                "label_0": labels[0],
                "label_1": labels[1],
                "has_label": True,
                "are_different": images[0] != images[1],
                "image_0_uid": uids[0],
                "image_1_uid": uids[1],
                "best_image_uid": "tie" if tie else uids[place],
                "ranking_id": number,
                "user_id": 0,
                "model_0": "diffalign/scenes",
                "model_1": "diffalign/scenes",
                "num_example_per_prompt": uses[text],
            }
        )
    return out


def write(path: Path, count: int, seed: int) -> dict[str, float]:
    """Write the parquet file; return the counts for the report."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows(count, seed))
    pq.write_table(table, path, compression="zstd", compression_level=19)
    ties = sum(v == 0.5 for v in table["label_0"].to_pylist())
    return {"pairs": count, "ties": ties, "captions": len(set(table["caption"].to_pylist()))}
