"""Shards: several writers, kills, the earlier layout, addresses, a set of columns."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import save_file

from diffalign.config.schema import DataConfig
from diffalign.data import encode_preferences, read_preferences
from diffalign.data.encoding import folder as folder_module
from diffalign.data.encoding import shards as shards_module
from diffalign.data.encoding.store import Store, tensors_digest
from diffalign.data.reading.examples import digest
from diffalign.errors import UserError
from tests.data.conftest import Model, row, write_parquet

RECORDS = 60


def record(number):
    generator = torch.Generator().manual_seed(number)
    return digest(str(number).encode()), {"mean": torch.randn(4, 8, 8, generator=generator)}


def write_slowly(folder, seed):
    store = Store(folder, shard_bytes=2**13)
    store.salvage()
    numbers = list(range(RECORDS))
    random.Random(seed).shuffle(numbers)
    for number in numbers:
        key, tensors = record(number)
        if not store.has("latents", key):
            store.write("latents", key, tensors)
            time.sleep(0.005)
    store.seal()


def test_two_writers_that_are_killed_leave_the_cache_that_one_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "BATCH_BYTES", 2**11)
    forked = multiprocessing.get_context("fork")
    writers = [forked.Process(target=write_slowly, args=(tmp_path, seed)) for seed in range(2)]
    for writer in writers:
        writer.start()
    kills = 0
    for seed in (2, 3, 4):
        time.sleep(0.08)
        victim = seed % 2
        if writers[victim].is_alive():
            os.kill(writers[victim].pid, signal.SIGKILL)
            kills += 1
        writers[victim].join()
        writers[victim] = forked.Process(target=write_slowly, args=(tmp_path, seed))
        writers[victim].start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    store = Store(tmp_path)
    for number in range(RECORDS):
        key, tensors = record(number)
        assert torch.equal(store.read("latents", key)["mean"], tensors["mean"])
    assert store.salvage() == 0 and kills > 0
    assert not list((tmp_path / "shards").glob(".*.partial"))


def test_what_a_killed_writer_had_flushed_is_salvaged(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "BATCH_ROWS", 3)
    store = Store(tmp_path)
    for number in range(8):
        store.write("latents", *record(number))
    (partial,) = (tmp_path / "shards").glob(".*.partial")
    assert Store(tmp_path).salvage() == 0 and partial.exists()  # its writer lives and holds the lock
    store.abandon()
    with partial.open("r+b") as file:  # cut off in the middle of the second batch
        file.truncate(partial.stat().st_size - 10)
    fresh = Store(tmp_path)
    assert fresh.salvage() == 3 and not partial.exists()
    for number in range(3):
        assert torch.equal(fresh.read("latents", record(number)[0])["mean"], record(number)[1]["mean"])
    assert fresh.read("latents", record(3)[0]) is None


def test_shards_are_closed_at_their_size_and_hold_several_layouts(tmp_path):
    store = Store(tmp_path, shard_bytes=4 * 1024)
    for number in range(10):  # 1 KiB each
        store.write("latents", *record(number))
    store.write("latents", "f" * 32, {"mean": torch.ones(2).half(), "std": torch.zeros(3, 0).half()})
    store.seal()
    assert len(list((tmp_path / "shards").glob("*.arrow"))) == 4
    found = Store(tmp_path).read("latents", "f" * 32)
    assert found["mean"].tolist() == [1, 1] and found["std"].shape == (3, 0)
    assert found["mean"].dtype == torch.float16


def test_the_layout_of_earlier_versions_is_read_and_moves_to_shards(tmp_path, capsys):
    path = write_parquet(tmp_path / "p.parquet", [row(i) for i in range(3)])
    config = DataConfig(path=str(path), resolution=16)
    first = encode_preferences(Model(), read_preferences(config), config, tmp_path / "new", False)
    store, old = Store(tmp_path / "new"), Store(tmp_path / "old")
    keys = [("latents", image.key) for r in first for image in r.images] + [("text", r.text) for r in first]
    for kind, key in [*keys, ("text", first.shared.empty), ("text", first.shared.negative)]:
        tensors, file = store.read(kind, key), old.old_path(kind, key)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, {"digest": tensors_digest(tensors)})
    damaged = old.old_path("latents", first[0].images[0].key)
    damaged.write_bytes(damaged.read_bytes()[:-3])
    model = Model()
    second = encode_preferences(model, read_preferences(config), config, tmp_path / "old", False)
    assert list(second) == list(first) and model.images == 1 and not model.family.prompts
    assert "10 tensors" in capsys.readouterr().err  # 5 of 6 latents, 3 prompts, the empty one, the negative
    again = Model()
    encode_preferences(again, read_preferences(config), config, tmp_path / "old", False)
    assert not again.batches


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setenv(folder_module.MIRROR, str(tmp_path / "mirror"))
    return tmp_path / "mirror"


def test_sets_and_caches_may_lie_at_addresses(tmp_path, mirror):
    import fsspec

    path = write_parquet(tmp_path / "p.parquet", [row(i) for i in range(4)])
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/sets/p.parquet", path.read_bytes())
    local = DataConfig(path=str(path), resolution=16)
    remote = DataConfig(path="memory://bucket/sets/p.parquet", resolution=16)
    alone = encode_preferences(Model(), read_preferences(local), local, tmp_path / "c", False)
    try:
        there = encode_preferences(Model(), read_preferences(remote), remote, "memory://bucket/cache", False)
        assert list(there) == list(alone)
        names = memory.find("/bucket/cache")
        assert sum(name.endswith(".arrow") for name in names) == 4  # latents, text, manifest and its part
        for file in mirror.rglob("*"):  # another machine: nothing is copied yet
            if file.is_file():
                file.unlink()
        model = Model()
        again = encode_preferences(model, read_preferences(remote), remote, "memory://bucket/cache", False)
        assert not model.batches and not model.family.prompts
        image = again[2].images[1]
        assert torch.equal(again.moments(image)[0], alone.moments(image)[0])
    finally:
        memory.rm("/bucket", recursive=True)


def test_addresses_that_cannot_be_read(mirror):
    with pytest.raises(UserError, match="no such file or folder"):
        read_preferences(DataConfig(path="memory://nowhere/x.parquet"))
    with pytest.raises(UserError, match="nosuch"):
        Store("nosuch://bucket/cache")


def test_a_part_of_a_set_is_a_view_of_its_columns(encoded):
    whole = encoded([row(i, (0.5, 0.5) if i == 4 else (1.0, 0.0), prompt=f"p{i % 3}") for i in range(7)])
    part = whole.subset([5, 4, 0]).subset([1, 0])
    assert list(part) == [whole[4], whole[5]] and part.records.table is whole.records.table
    assert part.records.kinds.tolist() == ["tie", "pair"] and part.counts.text.startswith("1 pair, 1 tie")
    assert part.records.prompts[0] == ["p1", "p2"] and part[-1] == whole[5] and part[:1] == (whole[4],)
