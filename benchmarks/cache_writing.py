"""Compare the encoding of a set into the cache with the autoencoder alone, in alternation, in one process.

    python -m benchmarks.cache_writing

The autoencoder alone gets the same batches of pixels from memory. Encoding reads a parquet file, decodes and
crops JPEG files, encodes images and prompts, and writes shards and the index. tiny:sdxl, one thread.
"""

import json
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

PAIRS, SIDE, BATCH, REPETITIONS, PER_PROMPT = 12, 256, 8, 10, 6


def main() -> None:
    """Print the row."""
    print(json.dumps(measured()))


def measured() -> dict[str, Any]:
    """Measure both ``REPETITIONS`` times in alternation.

    The machine's clock varies by a third between repetitions, so the shares are ratios of the fastest ones,
    and ``mean_share`` is the ratio of the mean CPU times beside them.
    """
    import torch

    from diffalign.config.schema import DataConfig, ModelConfig
    from diffalign.data import encode_preferences, read_preferences
    from diffalign.data.encoding.images import to_unit
    from diffalign.media.images import decode
    from diffalign.models.loading import load

    torch.set_num_threads(1)
    model = load(ModelConfig(path="tiny:sdxl"), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = _write_set(folder / "pairs.parquet")
        pixels = torch.stack([_pixels(decode(file)) for file in files])
        config = DataConfig(path=str(folder / "pairs.parquet"), resolution=SIDE, cache_batch_size=BATCH)
        number = 0

        def bare() -> None:
            with torch.no_grad():
                for first in range(0, len(pixels), BATCH):
                    model.encode_pixels(to_unit(pixels[first : first + BATCH]))

        def cache() -> None:
            nonlocal number
            number += 1
            place = folder / f"cache{number}"
            encode_preferences(model, read_preferences(config), config, place, progress=False)

        bare(), cache()  # warm-up
        rows = [{"bare": _timed(bare), "cache": _timed(cache)} for _ in range(REPETITIONS)]
        size = sum(file.stat().st_size for file in (folder / "cache1").rglob("*") if file.is_file())
    best = {
        f"{kind}_{clock}": min(row[kind][clock] for row in rows)
        for kind in ("bare", "cache")
        for clock in ("cpu", "wall")
    }
    return {
        "images": len(files),
        "side": SIDE,
        "cache_mb": round(size / 1e6, 1),
        "repetitions": rows,
        **best,
        "cpu_share": round(best["bare_cpu"] / best["cache_cpu"], 3),
        "wall_share": round(best["bare_wall"] / best["cache_wall"], 3),
        "mean_share": round(
            sum(row["bare"]["cpu"] for row in rows) / sum(row["cache"]["cpu"] for row in rows), 3
        ),
    }


def _timed(call: Callable[[], None]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"cpu": round(time.process_time() - cpu, 2), "wall": round(time.perf_counter() - wall, 2)}


def _write_set(path: Path) -> list[bytes]:
    """Write the pairs as a parquet file; return their image files."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    draw = np.random.default_rng(0)
    files, rows = [], []
    for number in range(2 * PAIRS):
        small = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
        if number % 2:
            pair = {"jpg_0": files[-2], "jpg_1": files[-1], "label_0": 1.0, "label_1": 0.0}
            rows.append({"caption": f"prompt {number // 2 // PER_PROMPT}", "has_label": True, **pair})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return files


def _pixels(image: Any) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


if __name__ == "__main__":
    main()
