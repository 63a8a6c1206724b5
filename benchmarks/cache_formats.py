"""Compare Arrow IPC shards with safetensors shards and a parquet index: write, open, random reads, memory.

    python -m benchmarks.cache_formats

Each format is written and read twice in alternation, each time in its own process. Records have the size of
SDXL's at 1024 px (mean and standard deviation (4, 128, 128), embeddings (77, 2048), float16), or are small
((4, 4, 4) and (8, 16)) with many a shard. The cache of encoded sets uses the faster format
(``diffalign.data.encoding.shards``); the rows are part of ``benchmarks/data.json``.
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

SIZES = {
    "sdxl": ({"mean": (4, 128, 128), "std": (4, 128, 128), "text": (77, 2048)}, 1500, 250),
    "small": ({"mean": (4, 4, 4), "std": (4, 4, 4), "text": (8, 16)}, 60_000, 30_000),
}
FORMATS = ("arrow", "safetensors")
BATCH_BYTES = 16 * 2**20  # size of an Arrow record batch


def main() -> None:
    """Print a row for each format and size."""
    for row in measured():
        print(json.dumps(row))


def measured() -> list[dict[str, Any]]:
    """Measure every size in both formats, twice in alternation; one row for each."""
    rows = []
    for size in SIZES:
        for repetition in range(2):
            for name in FORMATS:
                command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cache_formats", size, name]
                result = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.append(
                    {"size": size, "format": name, "repetition": repetition, **json.loads(result.stdout)}
                )
    return rows


def measure(size: str, name: str) -> dict[str, float]:
    """Write, open and read one set of records in this process."""
    shapes, count, per_shard = SIZES[size]
    tensors = {key: torch.randn(8, *shape).half() for key, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        started = perf_counter()
        write = _write_arrow if name == "arrow" else _write_safetensors
        write(Path(folder), tensors, count, per_shard)
        written = perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        megabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        before, started = memory(), perf_counter()
        read = (_open_arrow if name == "arrow" else _open_safetensors)(Path(folder), shapes)
        opened = perf_counter() - started
        order = np.random.default_rng(0).permutation(count)
        seconds = []
        for _ in range(3):
            started = perf_counter()
            for number in order:
                for tensor in read(f"{number:032x}"):
                    tensor.float()
            seconds.append(perf_counter() - started)
        after = memory()
    return {
        "written_mb_per_second": round(megabytes / written),
        "write_peak_mib": round(peak),
        "open_seconds": round(opened, 4),
        "records_per_second": round(count / min(seconds)),
        "read_mb_per_second": round(megabytes / min(seconds)),
        "anonymous_mib": round(after["RssAnon"] - before["RssAnon"]),
        "mapped_mib": round(after["RssFile"] - before["RssFile"]),
    }


def memory() -> dict[str, float]:
    """Return this process's resident memory, MiB: ``RssAnon`` and ``RssFile`` (mapped pages)."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0][:-1]: int(line[1]) / 1024 for line in lines if line[0] in ("RssAnon:", "RssFile:")}


def _write_arrow(folder: Path, tensors: dict[str, torch.Tensor], count: int, per_shard: int) -> None:
    schema = pa.schema([("key", pa.binary(16)), *((name, pa.large_binary()) for name in tensors)])
    record = sum(tensor[0].nbytes for tensor in tensors.values())
    step = max(1, min(per_shard, BATCH_BYTES // record))
    index: list[tuple[bytes, int, int, int]] = []
    for shard, first in enumerate(range(0, count, per_shard)):
        with pa.ipc.new_file(str(folder / f"{shard}.arrow"), schema) as file:
            for number, at in enumerate(range(first, first + per_shard, step)):
                rows = range(at, min(at + step, first + per_shard))
                keys = [row.to_bytes(16, "big") for row in rows]
                columns = [
                    pa.array([tensor[row % 8].numpy().data.cast("B") for row in rows], pa.large_binary())
                    for tensor in tensors.values()
                ]
                file.write_batch(pa.record_batch([pa.array(keys, pa.binary(16)), *columns], schema=schema))
                index += [(key, shard, number, row) for row, key in enumerate(keys)]
    _write_index(folder, index)


def _write_safetensors(folder: Path, tensors: dict[str, torch.Tensor], count: int, per_shard: int) -> None:
    index: list[tuple[bytes, int, int, int]] = []
    for shard, first in enumerate(range(0, count, per_shard)):
        rows = range(first, first + per_shard)
        named = {f"{row:032x}.{name}": t[row % 8].clone() for row in rows for name, t in tensors.items()}
        save_file(named, folder / f"{shard}.safetensors")
        index += [(row.to_bytes(16, "big"), shard, 0, 0) for row in rows]
    _write_index(folder, index)


def _write_index(folder: Path, index: list[tuple[bytes, int, int, int]]) -> None:
    names = ("key", "shard", "batch", "row")
    pq.write_table(
        pa.table(dict(zip(names, zip(*index, strict=True), strict=True))), folder / "index.parquet"
    )


def _read_index(folder: Path) -> dict[str, tuple[int, int, int]]:
    table = pq.read_table(folder / "index.parquet").to_pydict()
    places = zip(table["shard"], table["batch"], table["row"], strict=True)
    return {key.hex(): place for key, place in zip(table["key"], places, strict=True)}


def _open_arrow(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Any:
    index = _read_index(folder)
    files = {int(file.stem): pa.ipc.open_file(pa.memory_map(str(file))) for file in folder.glob("*.arrow")}
    batches = {shard: [f.get_batch(i) for i in range(f.num_record_batches)] for shard, f in files.items()}

    def read(key: str) -> Iterator[torch.Tensor]:
        shard, number, row = index[key]
        batch = batches[shard][number]
        for name, shape in shapes.items():
            yield torch.frombuffer(batch.column(name)[row].as_buffer(), dtype=torch.float16).view(shape)

    return read


def _open_safetensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Any:
    index = _read_index(folder)
    files = {
        int(file.stem): safe_open(file, framework="pt").__enter__() for file in folder.glob("*.safetensors")
    }

    def read(key: str) -> Iterator[torch.Tensor]:
        shard, _, _ = index[key]
        for name in shapes:
            yield files[shard].get_tensor(f"{key}.{name}")

    return read


if __name__ == "__main__":
    if len(sys.argv) == 3:
        torch.set_num_threads(1)
        print(json.dumps(measure(sys.argv[1], sys.argv[2])))
    else:
        main()
