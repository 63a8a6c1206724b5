"""Session fixtures: a tiny model, preference files with each kind of fault, and one finished run."""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def png(seed: int, size: int = 64) -> bytes:
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_pairs(path: Path, labels: list[float], prompt: str = "a cat {}") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {
        "caption": [prompt.format(i) for i in range(len(labels))],
        "jpg_0": [png(2 * i) for i in range(len(labels))],
        "jpg_1": [png(2 * i + 1) for i in range(len(labels))],
        "label_0": labels,
        "label_1": [1 - label for label in labels],
    }
    schema = pa.schema(
        [
            ("caption", "string"),
            ("jpg_0", "binary"),
            ("jpg_1", "binary"),
            ("label_0", "float64"),
            ("label_1", "float64"),
        ]
    )
    pq.write_table(pa.table(rows, schema=schema), path)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.tiny_pipelines import make_sd15, make_sdxl

    root = tmp_path_factory.mktemp("world")
    make_sdxl(root / "model")
    make_sd15(root / "model15")
    write_pairs(root / "pairs.parquet", [1.0, 0.0, 1.0, 0.5])
    write_pairs(root / "ties.parquet", [0.5, 0.5])
    write_pairs(root / "empty.parquet", [])
    (root / "corrupt.parquet").write_bytes((root / "pairs.parquet").read_bytes()[:300])
    pq.write_table(pa.table({"text": ["a"], "image": [b"x"]}), root / "columns.parquet")
    for folder, side in (("one-sided", "w"), ("captionless", "w"), ("captionless", "l")):
        (root / folder / side).mkdir(parents=True, exist_ok=True)
        (root / folder / side / "a.png").write_bytes(png(0))
    (root / "one-sided" / "a.txt").write_text("a cat")
    (root / "bare").mkdir()
    (root / "words.csv").write_text("a,b\n")
    row = {"prompt": "a cat", "chosen": "gone.png", "rejected": "away.png"}
    (root / "missing-image.jsonl").write_text(json.dumps(row) + "\n")
    (root / "broken.jsonl").write_text('{"prompt": "a cat",\n')
    (root / "prompts.txt").write_text("a cat\na dog\n")
    (root / "blank.txt").write_text("\n\n")
    (root / "a-file").write_text("")
    (root / "syntax.yaml").write_text("model: {path: [x\n")
    (root / "unknown.yaml").write_text("model: {lora: {rnak: 4}}\n")
    (root / "good.yaml").write_text(
        "method: {type: dpo, beta: 100}\nmodel: {path: model}\n"
        "data: {path: pairs.parquet, resolution: 64, holdout: 0}\n"
        "training: {steps: 2, batch_size: 2}\nlogging: {trackers: []}\ncheckpoint: {every: 1}\n"
    )
    return root


@pytest.fixture(scope="session")
def finished(world) -> Path:
    """Make a run directory of two steps."""
    from diffalign.cli import main

    with contextlib.chdir(world):
        assert main(["train", "good.yaml", "--output", "run"]) == 0
    return world / "run"
