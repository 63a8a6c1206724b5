"""Measure the cache of encoded sets at large sizes: files, bytes, start, memory, batches a second, kills.

    python -m benchmarks.data [--pairs 10000,100000,1000000] [--kills 10] [--folder runs/data]

Each size is built (small latents (4, 4, 4) and embeddings (8, 16), float16, ten pairs a prompt) and then read
by a fresh process: seconds from its start to the first batch, resident memory beyond what the imports take,
and batches of 8 pairs a second in the order of a run. Sets of up to 10,000 are read from the layout of
earlier versions, one file a record, as well. Then processes that write one cache are killed at random times;
the cache must hold what one that is left alone writes. At last encoding is measured against the bare
autoencoder (``benchmarks.cache_writing``). Rows go to ``benchmarks/data.json``, the table to
``benchmarks/data.md``. Sizes that are not named stay as they were measured before, and with ``--kills 0`` so
do kills and writing. What is built is removed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BATCH, BATCHES = 8, 200
RECORDS = 240  # that the processes write while they are killed
PER_PROMPT = 10
SHARD_ROWS, BATCH_ROWS = 2**18, 2**14


def main() -> None:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", default="10000,100000,1000000")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--folder", default="runs/data")
    parser.add_argument("--stage", default="", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--old", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.folder)
    if args.stage == "read":
        print(json.dumps(read(folder, args.number, args.old)))
    elif args.stage == "write":
        write_slowly(folder, args.number)
    else:
        everything(folder, [int(number) for number in args.pairs.split(",")], args.kills)


def everything(folder: Path, sizes: list[int], kills: int) -> None:
    """Build, read and remove each size, kill writers, and write rows and table."""
    earlier = json.loads((HERE / "data.json").read_text(encoding="utf-8"))
    rows = [row for row in earlier["sizes"] if row["pairs"] not in sizes]
    for pairs in sizes:
        place = folder / str(pairs)
        shutil.rmtree(place, ignore_errors=True)
        built = build(place, pairs)
        row = {**built, **_apart("read", place, pairs)}
        if pairs <= 10_000:
            row["old_layout"] = {**to_old_layout(place), **_apart("read", place, pairs, "--old")}
        shutil.rmtree(place)
        rows.append(row)
        print(json.dumps(row), flush=True)
    killed, writing = earlier.get("kills"), earlier.get("writing")
    if kills:
        killed = kill(folder / "kills", kills)
        shutil.rmtree(folder / "kills")
        print(json.dumps(killed), flush=True)
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cache_writing"]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        writing = json.loads(result.stdout.splitlines()[-1])
        print(json.dumps(writing), flush=True)
    whole = {
        "command": "python -m benchmarks.data",
        "machine": "2 CPU cores, x86_64",
        "date": datetime.now(UTC).date().isoformat(),
        "load": round(os.getloadavg()[1], 1),
        "sizes": sorted(rows, key=lambda row: row["pairs"]),
        "kills": killed,
        "writing": writing,
        "formats": earlier.get("formats", []),
    }
    (HERE / "data.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (HERE / "data.md").write_text(table(whole), encoding="utf-8")


def _apart(stage: str, folder: Path, number: int, *more: str) -> dict[str, Any]:
    started = time.time()
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.data", "--stage", stage]
    command += ["--folder", str(folder), "--number", str(number), *more]
    environment = {**os.environ, "STARTED": str(started)}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


class Model:
    """A stand-in for the encoders of an encoded set."""

    fingerprint = "benchmark"

    def micro_conditions(self, original_size: Any, crop: Any, target_size: Any) -> dict[str, Any]:
        """Return SDXL's six numbers."""
        import torch

        return {"time_ids": torch.cat([original_size, crop, target_size], dim=1)}


def _key(kind: int, number: int) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(f"{kind} {number}".encode())


def _set(pairs: int) -> tuple[Any, Any]:
    from diffalign.config.schema import DataConfig
    from diffalign.data import Preferences

    config = DataConfig(path="synthetic", resolution=32)
    return Preferences("synthetic", lambda: iter(()), pairs, f"synthetic {pairs}"), config


def build(folder: Path, pairs: int) -> dict[str, Any]:
    """Write the shards and the manifest of a set, whole columns at once; return files, bytes and seconds."""
    import numpy as np
    import torch

    from diffalign.data.encoding.encode import set_name
    from diffalign.data.encoding.encoded import Shared, write_manifest
    from diffalign.data.encoding.store import Store
    from diffalign.data.reading.examples import Counts

    started = time.process_time()
    torch.set_num_threads(1)
    store, draw = Store(folder), np.random.default_rng(0)
    latents = draw.integers(0, 256, (2 * pairs, 16), dtype=np.uint8)
    texts = draw.integers(0, 256, (-(-pairs // PER_PROMPT) + 2, 16), dtype=np.uint8)
    write_shards(store, "latents", latents, {"mean": (4, 4, 4), "std": (4, 4, 4)})
    write_shards(store, "text", texts, {"encoder_hidden_states": (8, 16)})
    shared = Shared(texts[-1].tobytes().hex(), texts[-2].tobytes().hex())
    preferences, config = _set(pairs)
    name = f"manifests/{set_name(Model(), preferences, config, True, None)}.arrow"  # type: ignore[arg-type]
    temporary = store.files.temporary("manifests", ".tmp")
    write_manifest(temporary, manifest(latents, texts, pairs), shared, Counts(usable=pairs))
    store.files.put(temporary, name)
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        "pairs": pairs,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "build_cpu_seconds": round(time.process_time() - started, 1),
    }


def write_shards(store: Any, kind: str, keys: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write float16 records of equal shapes under (n, 16) uint8 keys, in the store's own layout."""
    import numpy as np
    import pyarrow as pa
    import torch
    import xxhash

    from diffalign.data.encoding import shards

    layout = tuple((name, torch.float16) for name in sorted(shapes))
    draw = np.random.default_rng(1)
    for first in range(0, len(keys), SHARD_ROWS):
        own = keys[first : first + SHARD_ROWS]
        path = store.files.temporary(shards.PART, ".tmp")
        checksums: dict[bytes, int] = {}
        with pa.ipc.new_file(pa.OSFile(str(path), "wb"), shards._schema(layout)) as file:
            for at in range(0, len(own), BATCH_ROWS):
                part = np.ascontiguousarray(own[at : at + BATCH_ROWS])
                columns = [_binary(part)]
                values = {}
                for name, _ in layout:
                    count = int(np.prod(shapes[name]))
                    values[name] = draw.standard_normal((len(part), count), np.float32).astype(np.float16)
                    offsets = np.arange(len(part) + 1, dtype=np.int64) * 2 * count
                    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(values[name])]
                    columns.append(pa.Array.from_buffers(pa.large_binary(), len(part), buffers))
                    columns.append(_lists(np.tile(np.array(shapes[name], np.int32), (len(part), 1))))
                file.write_batch(pa.record_batch(columns, schema=shards._schema(layout)))
                headers = {name: shards._described(name, torch.float16, shapes[name]) for name, _ in layout}
                for row, key in enumerate(part):
                    whole = b"".join(headers[name] + values[name][row].tobytes() for name, _ in layout)
                    checksums[key.tobytes()] = xxhash.xxh3_64_intdigest(whole)
        index = store.files.temporary(shards.PART, ".index.tmp")
        shards._write_index(path, index, checksums)
        store.files.put(path, f"{shards.PART}/{kind}-{first:032x}.arrow")
        store.files.put(index, f"{shards.PART}/{kind}-{first:032x}.index")


def _binary(rows: Any) -> Any:
    import pyarrow as pa

    return pa.Array.from_buffers(pa.binary(16), len(rows), [None, pa.py_buffer(rows)])


def _lists(rows: Any) -> Any:
    import numpy as np
    import pyarrow as pa

    count, width = rows.shape
    return pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * width, pa.array(rows.reshape(-1)))


def manifest(latents: Any, texts: Any, pairs: int) -> Iterator[Any]:
    """Yield the record batches of a set of pairs with the keys of its images and of its prompts."""
    import numpy as np
    import pyarrow as pa

    from diffalign.data.encoding.records import ROWS, SCHEMA

    fields = list(SCHEMA.field("images").type.value_type)
    for first in range(0, pairs, ROWS):
        rows = np.arange(first, min(first + ROWS, pairs))
        keys = np.ascontiguousarray(latents[2 * rows[0] : 2 * rows[-1] + 2])
        count = len(keys)
        size = _lists(np.tile(np.array([32, 32], np.int32), (count, 1)))
        corner = _lists(np.zeros((count, 2), np.int32))
        cells = {
            "key": _binary(keys), "flipped": pa.nulls(count, pa.binary(16)), "original": size,
            "resized": size,
            "corner": corner, "target": size, "frames": pa.array(np.zeros(count, np.int32)),
            "fps": pa.array(np.zeros(count)), "content": _binary(keys),
        }  # fmt: skip
        images = pa.StructArray.from_arrays([cells[field.name] for field in fields], fields=fields)
        columns = {
            "prompt": pa.array([f"prompt {row // PER_PROMPT}" for row in rows], pa.large_string()),
            "text": _binary(np.ascontiguousarray(texts[rows // PER_PROMPT])),
            "images": pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32) * 2, images),
            "scores": _lists(np.tile(np.array([1.0, 0.0]), (len(rows), 1))),
            "where": pa.array([f"synthetic row {row}" for row in rows], pa.large_string()),
            "weight": pa.array(np.ones(len(rows))),
        }
        for field in SCHEMA:  # what plain pairs lack: empty lists, or null
            empty = [] if pa.types.is_list(field.type) else None
            columns.setdefault(field.name, pa.array([empty] * len(rows), field.type))
        yield pa.table(columns).select(SCHEMA.names).cast(SCHEMA).combine_chunks().to_batches()[0]


def read(folder: Path, pairs: int, old: bool) -> dict[str, float]:
    """Open a set as a run does and read batches of it."""
    import torch

    from benchmarks.cache_formats import memory
    from diffalign.data import PairSource, encode_preferences, split_holdout
    from diffalign.data.batches.order import scarce
    from diffalign.data.batches.views import viewed
    from diffalign.data.encoding import encode
    from diffalign.runs.resume import data_content

    torch.set_num_threads(1)
    if old:
        _one_file_each(folder)
    begun = memory()
    imported = time.time() - float(os.environ["STARTED"])
    preferences, config = _set(pairs)
    model: Any = Model()
    encode.MEMORY = min(encode.MEMORY, 64 * 2**20)  # so that what is measured is the store, not its memory
    encoded = encode_preferences(model, preferences, config, folder, half=True, progress=False)
    learned, held_out = split_holdout(encoded, config.holdout, config.max_holdout, 0)
    data_content(learned, held_out)
    scarce(learned.records, BATCH)
    source = PairSource(learned, model, config, BATCH)
    source.batch(0)
    first = time.time() - float(os.environ["STARTED"])
    cpu = time.process_time()
    started = time.perf_counter()
    for step in range(1, BATCHES + 1):
        source.batch(step)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    now = memory()
    likes = time.process_time()
    singles = len(viewed(encoded, replace(config, view="likes")))
    likes = time.process_time() - likes
    return {
        "first_batch_seconds": round(first, 2),
        "of_it_imports": round(imported, 2),
        "first_batch_cpu_seconds": round(cpu, 2),
        "anonymous_mib": round(now["RssAnon"] - begun["RssAnon"]),
        "mapped_mib": round(now["RssFile"] - begun["RssFile"]),
        "batches_per_second": round(BATCHES / seconds, 1),
        "batch_cpu_ms": round(1000 * cpu_seconds / BATCHES, 2),
        "held_out": len(held_out),
        "likes": singles,
        "likes_cpu_seconds": round(likes, 2),
    }


def to_old_layout(folder: Path) -> dict[str, float]:
    """Write each record of a store to a safetensors file of its own, as earlier versions did."""
    from safetensors.torch import save_file

    from diffalign.data.encoding.shards import Shard
    from diffalign.data.encoding.store import Store, tensors_digest

    store, files = Store(folder), 0
    for index in sorted((folder / "shards").glob("*.index")):
        shard = Shard(store.files, f"shards/{index.name}", index)
        for row, (high, low) in enumerate(shard.keys.tolist()):
            tensors = shard.read(row)
            assert tensors is not None
            path = store.old_path(shard.kind, f"{high:016x}{low:016x}")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, {"digest": tensors_digest(tensors)})
            files += 1
    return {"files": files}


def _one_file_each(folder: Path) -> None:
    """Make stores read the files of the earlier layout; the shards must be complete."""
    from diffalign.data.encoding.store import Store, _read_old

    Store.read = lambda self, kind, key: _read_old(self.old_path(kind, key))  # type: ignore[method-assign]


def record(number: int) -> tuple[str, dict[str, Any]]:
    """Return the key and the tensors of a writer's record, which depend on its number only."""
    import torch

    generator = torch.Generator().manual_seed(number)
    return _key(3, number), {"mean": torch.randn(4, 32, 32, generator=generator)}


def write_slowly(folder: Path, seed: int) -> None:
    """Write the missing ones of ``RECORDS`` records in a random order, a few milliseconds each."""
    from diffalign.data.encoding import shards
    from diffalign.data.encoding.store import Store

    shards.BATCH_BYTES = 2**16
    store = Store(folder, shard_bytes=2**18)
    store.salvage()
    print("begun", flush=True)
    order = list(range(RECORDS))
    random.Random(seed).shuffle(order)
    for number in order:
        key, tensors = record(number)
        if not store.has("latents", key):
            store.write("latents", key, tensors)
            time.sleep(0.01)
    store.seal()
    print("done", flush=True)


def kill(folder: Path, kills: int) -> dict[str, Any]:
    """Write one cache with two processes, kill and restart one at random ``kills`` times, and compare."""
    from diffalign.data.encoding.store import Store

    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.data", "--stage", "write"]
    command += ["--folder", str(folder)]
    draw, done, started = random.Random(0), 0, 0

    def start() -> subprocess.Popen[str]:
        nonlocal started
        started += 1
        return subprocess.Popen([*command, "--number", str(started)], stdout=subprocess.PIPE, text=True)

    writers = [start(), start()]
    written = []
    while done < kills:
        victim = draw.randrange(2)
        output = writers[victim].stdout
        assert output is not None
        output.readline()  # it has begun to write
        time.sleep(draw.uniform(0.05, 2.0))
        if writers[victim].poll() is None:
            writers[victim].send_signal(signal.SIGKILL)
            done += 1
        elif writers[victim].returncode:
            raise RuntimeError(f"a writer ended with {writers[victim].returncode}")
        writers[victim].wait()
        if writers[victim].returncode == 0:  # it was faster than the killer: begin with less
            for index in sorted((folder / "shards").glob("*.index"))[::2]:
                index.unlink()
        written.append(len(list((folder / "shards").glob("*.index"))) if folder.exists() else 0)
        writers[victim] = start()
    for writer in writers:
        writer.wait()
    store = Store(folder)
    saved = store.salvage()
    differing = 0
    for number in range(RECORDS):
        key, tensors = record(number)
        there = store.read("latents", key)
        differing += there is None or not bool((there["mean"] == tensors["mean"]).all())
    return {
        "kills": done,
        "records": RECORDS,
        "differing": differing,
        "salvaged_at_the_end": saved,
        "shards_after_each_kill": written,
    }


def table(whole: dict[str, Any]) -> str:
    """Return the Markdown of a measurement."""
    old = whole["sizes"][0].get("old_layout", {})
    lines = [
        "# The cache of encoded sets at size",
        "",
        f"`{whole['command']}`, {whole['machine']}, {whole['date']}, load average {whole['load']}.",
        "",
        "| pairs | files | MB | start to first batch, s (CPU s) | memory beyond imports, MiB: own + mapped | "
        "batches of 8 a second | CPU ms a batch | data.view likes, CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in whole["sizes"]:
        lines.append(
            f"| {row['pairs']:,} | {row['files']} | {row['bytes'] / 1e6:,.0f} | {row['first_batch_seconds']} "
            f"({row['first_batch_cpu_seconds']}) | {row['anonymous_mib']} + {row['mapped_mib']} | "
            f"{row['batches_per_second']} | {row['batch_cpu_ms']} | {row['likes_cpu_seconds']} |"
        )
    if old:
        lines += [
            "",
            f"One file a record ({old['files']:,} files for {whole['sizes'][0]['pairs']:,} pairs): "
            f"{old['batches_per_second']} batches a second, {old['batch_cpu_ms']} CPU ms a batch.",
        ]
    killed = whole["kills"]
    lines += [
        "",
        f"Two processes writing one cache, {killed['kills']} kills: {killed['differing']} of "
        f"{killed['records']} records differ.",
        "",
    ]
    writing = whole["writing"]
    lines += [
        f"Encoding {writing['images']} JPEG images of {writing['side']} px with tiny:sdxl into the cache "
        f"against the bare autoencoder on pixels in memory (one thread, in alternation, fastest of "
        f"{len(writing['repetitions'])}): {writing['cpu_share']:.1%} of its throughput by CPU time, "
        f"{writing['wall_share']:.1%} by the clock; of the mean CPU times {writing['mean_share']:.1%}.",
        "",
    ]
    if whole["formats"]:
        lines += [
            "## Format: `python -m benchmarks.cache_formats`",
            "",
            "| size | format | written MB/s | open, s | records read a second | own memory, MiB |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['size']} | {row['format']} | {row['written_mb_per_second']} | {row['open_seconds']} | "
            f"{row['records_per_second']:,} | {row['anonymous_mib']} |"
            for row in whole["formats"]
        ]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
