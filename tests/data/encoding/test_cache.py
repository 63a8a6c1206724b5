import errno
import threading

import pytest
import torch

import diffalign.data.encoding.shards as shards_module
from diffalign.config.schema import DataConfig
from diffalign.data import encode_preferences, read_preferences, split_holdout
from diffalign.data.encoding import folder as files_module
from diffalign.data.encoding.encoded import VERSION
from diffalign.data.encoding.images import cut_out, to_unit
from diffalign.data.encoding.store import Memory, Store
from diffalign.data.reading.summary import summarise
from diffalign.errors import UserError
from diffalign.media.images import decode
from diffalign.runs.labels import tell_of_contents
from tests.data.conftest import Model, picture, png, row, write_jsonl, write_parquet

KEYS = [f"{number:032x}" for number in (7, 2**64 + 7, 2**127)]
ROWS = [row(0), row(1, (0.0, 1.0)), row(2, (0.5, 0.5)), row(3, (None, None)), row(4, prompt="prompt 0")]


def encode(path, cache, model, **settings):
    extra = {name: settings.pop(name) for name in ("half", "rank", "world", "barrier") if name in settings}
    config = DataConfig(path=str(path), **{"resolution": 16, **settings})
    return encode_preferences(model, read_preferences(config), config, cache, False, **extra)


@pytest.fixture
def path(tmp_path):
    return write_parquet(tmp_path / "p.parquet", ROWS)


def test_what_is_stored_is_the_posterior_of_the_image(path, tmp_path, model):
    encoded = encode(path, tmp_path / "c", model, flip=True)
    assert [record.where for record in encoded] == [f"p.parquet row {i}" for i in (0, 1, 2, 4)]
    assert [record.scores for record in encoded] == [(1, 0), (0, 1), (0.5, 0.5), (1, 0)]
    assert encoded.counts.text == "3 pairs, 1 tie, 1 row without label, 0 unreadable"
    image = encoded[1].images[1]
    pixels = to_unit(cut_out(decode(png(3)), image.cut))[None]
    for flipped in (False, True):
        mean, std = model.encode_pixels(pixels.flip(-1) if flipped else pixels)
        kept_mean, kept_std = encoded.moments(image, flipped)
        assert torch.equal(kept_mean, mean[0]) and torch.equal(kept_std, std[0])
        assert kept_mean.shape == (3, 2, 2) and kept_mean.dtype == torch.float32


def test_prompts_are_encoded_once_with_the_empty_one(path, tmp_path, model):
    encoded = encode(path, tmp_path / "c", model)
    assert sorted(model.family.prompts) == ["", "prompt 0", "prompt 1", "prompt 2"]
    assert encoded.text(encoded[0])["text_embeds"].tolist() == [float(sum(map(ord, "prompt 0")))]
    assert encoded.text(encoded[0])["encoder_hidden_states"].shape == (3, 2)
    assert encoded.empty_text(encoded[0])["text_embeds"].tolist() == [0.0]


def test_images_are_encoded_in_batches_of_equal_shape(tmp_path, model):
    sizes = [((40, 40), (40, 40)), ((80, 40), (80, 40))]
    rows = [row(i, sizes=sizes[i % 2]) for i in range(6)]
    path = write_parquet(tmp_path / "p.parquet", rows)
    encode(path, tmp_path / "c", model, buckets=True, bucket_step=8, resolution=32, cache_batch_size=4)
    assert sorted(model.batches) == sorted([(4, 3, 32, 32), (2, 3, 32, 32), (4, 3, 24, 40), (2, 3, 24, 40)])


def test_the_same_image_is_encoded_once(tmp_path, model):
    rows = [row(0), {**row(1), "jpg_0": png(0)}, {**row(2), "jpg_1": png(0)}]
    encoded = encode(write_parquet(tmp_path / "p.parquet", rows), tmp_path / "c", model)
    assert model.images == 4
    assert encoded[0].images[0] == encoded[1].images[0] == encoded[2].images[1]


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_second_run_encodes_nothing(tmp_path, format):
    if format == "parquet":
        path = write_parquet(tmp_path / "p.parquet", ROWS)
    else:  # has no fingerprint: it is read again, and found
        for number in range(4):
            (tmp_path / f"{number}.png").write_bytes(png(number))
        entries = [
            {"prompt": f"{i}", "chosen": f"{2 * i}.png", "rejected": f"{2 * i + 1}.png"} for i in range(2)
        ]
        path = write_jsonl(tmp_path / "p.jsonl", entries)
    first = encode(path, tmp_path / "c", Model())
    again = Model()
    second = encode(path, tmp_path / "c", again)
    assert not again.batches and not again.family.prompts
    assert list(second) == list(first) and second.counts == first.counts
    assert torch.equal(second.moments(second[0].images[0])[0], first.moments(first[0].images[0])[0])


@pytest.mark.parametrize(
    ("change", "images"),
    [
        ({"resolution": 24}, 8),
        ({"crop": "random"}, 8),
        ({"flip": True}, 8),
        ({"half": True}, 8),
        ({"cache_batch_size": 1}, 0),
        ({"limit": 2}, 0),
        ({"flip_labels": 1.0}, 0),
    ],
)
def test_settings_that_change_the_numbers_change_the_keys(tmp_path, change, images):
    rows = [row(i, sizes=((40, 60), (40, 60))) for i in range(4)]
    path = write_parquet(tmp_path / "p.parquet", rows)
    encode(path, tmp_path / "c", Model())
    model = Model()
    encode(path, tmp_path / "c", model, **change)
    assert model.images == images


def test_another_model_shares_nothing(path, tmp_path):
    encode(path, tmp_path / "c", Model("one"))
    other = Model("two")
    encode(path, tmp_path / "c", other)
    assert other.images == 8 and len(other.family.prompts) == 4


def test_half_precision_models_keep_float16(path, tmp_path, model):
    encoded = encode(path, tmp_path / "c", model, half=True)
    store = Store(tmp_path / "c")
    assert store.read("latents", encoded[0].images[0].key)["mean"].dtype == torch.float16
    exact = encode(path, tmp_path / "c", model)
    mean, kept = exact.moments(exact[0].images[0])[0], encoded.moments(encoded[0].images[0])[0]
    assert kept.dtype == torch.float32 and torch.equal(kept, mean.half().float())


def test_an_interrupted_run_goes_on(path, tmp_path):
    stopped = Model(fails_after=2)
    with pytest.raises(KeyboardInterrupt):
        encode(path, tmp_path / "c", stopped, cache_batch_size=2)
    assert stopped.images == 4
    rest = Model()
    encoded = encode(path, tmp_path / "c", rest, cache_batch_size=2)
    assert rest.images == 4  # of 8
    whole = encode(path, tmp_path / "d", Model(), cache_batch_size=2)
    assert list(encoded) == list(whole)
    assert not list((tmp_path / "c").rglob("*.tmp"))


def place(store, kind, key):
    """(shard, row) of a record, and its file."""
    ((shard, row),) = store._index[kind].find(key)
    return shard, row, store.folder / f"{shard.name}.arrow"


@pytest.mark.parametrize("damage", ["truncated", "bits", "foreign", "gone", "index", "no index"])
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_damaged_record_is_encoded_again(path, tmp_path, damage, kind):
    first = encode(path, tmp_path / "c", Model())
    key = first[0].images[0].key if kind == "latents" else first[0].text
    wanted = first.moments(first[0].images[0])[0]
    store = Store(tmp_path / "c")
    shard, row, file = place(store, kind, key)
    index = file.with_suffix(".index")
    content = bytearray(file.read_bytes())
    name = "mean" if kind == "latents" else "encoder_hidden_states"
    at = int(shard._places[name][0][row])
    if damage in ("gone", "no index"):
        (file if damage == "gone" else index).unlink()
    elif damage == "truncated":
        file.write_bytes(content[: at + 3])
    elif damage == "foreign":
        file.write_bytes(b"hello")
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:-7])
    else:
        content[at] ^= 1
        file.write_bytes(bytes(content))
    model = Model()
    second = encode(path, tmp_path / "c", model)
    images, texts = model.images, len(model.family.prompts)
    if damage == "bits":
        assert (images, texts) == ((1, 0) if kind == "latents" else (0, 1))
    else:  # the records before the damage are kept
        assert (images > 0, texts > 0) == ((True, False) if kind == "latents" else (False, True))
    assert torch.equal(second.moments(second[0].images[0])[0], wanted)
    again = Model()
    encode(path, tmp_path / "c", again)
    assert not again.batches and not again.family.prompts


def test_damage_after_encoding_is_an_error_that_mends(path, tmp_path):
    encoded = encode(path, tmp_path / "c", Model())
    store = Store(tmp_path / "c")
    shard, row, file = place(store, "latents", encoded[0].images[0].key)
    content = bytearray(file.read_bytes())
    content[int(shard._places["std"][0][row])] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match="missing or damaged since it was encoded"):
        encoded.moments(encoded[0].images[0])
    assert (tmp_path / "c" / f"{shard.name}.damaged").read_text().split() == [str(row)]
    assert Store(tmp_path / "c").read("latents", encoded[0].images[0].key) is None
    model = Model()
    mended = encode(path, tmp_path / "c", model)
    assert model.images == 1 and mended.moments(mended[0].images[0])[0].shape == (3, 2, 2)


def test_a_damaged_manifest_is_made_again(path, tmp_path):
    first = encode(path, tmp_path / "c", Model())
    records = list(first)
    (manifest,) = (tmp_path / "c" / "manifests").glob("*.arrow")
    whole = manifest.read_bytes()
    assert b"version" in whole and VERSION == 7
    for content in (b"", b"{", whole[:-40], whole.replace(b"7", b"0", 1) if b"7" in whole else b""):
        manifest.unlink()  # a process may have the old file mapped
        manifest.write_bytes(content)
        model = Model()
        assert list(encode(path, tmp_path / "c", model)) == records
        assert not model.batches


@pytest.mark.parametrize("workers", [0, 3])
def test_unreadable_images_are_skipped_and_named(tmp_path, model, capsys, workers):
    rows = [row(i) for i in range(5)]
    rows[1]["jpg_1"] = rows[1]["jpg_1"][:300]
    rows[3]["jpg_0"] = b"no image"
    path = write_parquet(tmp_path / "p.parquet", rows)
    encoded = encode(path, tmp_path / "c", model, workers=workers)
    assert encoded.counts.text == "3 pairs, 0 ties, 0 rows without label, 2 unreadable"
    assert [record.where[-1] for record in encoded] == ["0", "2", "4"]
    named = capsys.readouterr().err
    assert "skipped p.parquet row 1: image 1 is unreadable (" in named
    assert "skipped p.parquet row 3: image 0 is unreadable (not an image in one of the formats" in named
    assert model.images == 6
    again = encode(path, tmp_path / "c", Model(), workers=workers)
    assert again.counts == encoded.counts and list(again) == list(encoded)


def test_threads_give_what_one_gives(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [row(i) for i in range(12)])
    one, many = encode(path, tmp_path / "c", Model()), encode(path, tmp_path / "d", Model(), workers=3)
    assert list(one) == list(many)


@pytest.mark.parametrize(
    "rows",
    [[row(0, (0.5, 0.5))], [row(0, (None, None))], [{**row(0), "jpg_0": b"x"}]],
    ids=["ties", "unlabelled", "unreadable"],
)
def test_a_set_with_nothing_to_learn_is_an_error(tmp_path, model, rows):
    path = write_parquet(tmp_path / "p.parquet", rows)
    for _ in range(2):
        with pytest.raises(UserError, match="nothing to learn from: 0 pairs, "):
            encode(path, tmp_path / "c", model)


def test_an_empty_table(tmp_path, model):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([row(0)]).slice(0, 0), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="0 pairs, 0 ties, 0 rows without label, 0 unreadable"):
        encode(tmp_path / "p.parquet", tmp_path / "c", model)


def test_several_processes_share_the_work(tmp_path):
    rows = [row(i, (0.5, 0.5) if i == 4 else (1.0, 0.0)) for i in range(7)]
    rows[5]["jpg_0"] = b"no image"
    path = write_parquet(tmp_path / "p.parquet", rows)
    models, results, barrier = [Model(), Model(), Model()], {}, threading.Barrier(3, timeout=120)

    def work(rank):
        results[rank] = encode(path, tmp_path / "c", models[rank], rank=rank, world=3, barrier=barrier.wait)

    for _ in range(2):  # the second time nothing is left to do
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [model.images for model in models] == [6, 4, 2]
        alone = encode(path, tmp_path / "d", Model())
        for rank in range(3):
            assert list(results[rank]) == list(alone) and results[rank].counts == alone.counts


def test_runs_that_share_a_cache_do_not_disturb_each_other(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [row(i) for i in range(10)])
    alone = encode(path, tmp_path / "d", Model())
    results: dict[int, object] = {}

    def work(number):
        results[number] = encode(path, tmp_path / "c", Model(), cache_batch_size=1 + number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [list(results[number]) for number in range(4)] == [list(alone)] * 4


def test_a_full_disk_says_where_and_how_much(path, tmp_path, monkeypatch, model):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards_module.ShardWriter, "flush", full)
    with pytest.raises(
        UserError, match=r"no space left in .*c: about \d+\.\d MiB more are needed, \d+\.\d MiB are free"
    ):
        encode(path, tmp_path / "c", model)


def test_nothing_is_left_of_a_write_that_failed(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write("latents", KEYS[0], {"mean": torch.zeros(2)})
    monkeypatch.setattr(
        files_module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "io"))
    )
    with pytest.raises(OSError, match="io"):
        store.seal()
    assert [file for file in tmp_path.rglob("*") if file.is_file() and not file.name.startswith(".")] == []


def test_a_cache_folder_that_cannot_be_made(tmp_path, path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir .*cannot be made"):
        encode(path, tmp_path / "file" / "c", model)


def test_nan_of_the_vae_is_an_error_that_says_what_to_do(path, tmp_path):
    class Broken(Model):
        def encode_pixels(self, pixels):
            mean, std = super().encode_pixels(pixels)
            return mean * float("nan"), std

    with pytest.raises(
        UserError, match=r"the VAE gives NaN; set model.dtype to bfloat16 or float32, or model.vae"
    ):
        encode(path, tmp_path / "c", Broken())


def test_memory_stays_within_its_budget(tmp_path):
    store = Store(tmp_path)
    for number, key in enumerate(KEYS):
        store.write("latents", key, {"mean": torch.full((4,), float(number))})
    memory = Memory(store, budget=32)
    for number in (0, 1, 2, 0):
        assert memory.get("latents", KEYS[number])["mean"].tolist() == [float(number)] * 4
    assert memory._bytes == 32 and list(memory._held) == [("latents", KEYS[2]), ("latents", KEYS[0])]


# the held-out part


def test_holdout_is_disjoint_by_prompt(encoded):
    rows = [row(i, prompt=f"prompt {i % 13}") for i in range(40)]
    whole = encoded(rows)
    train, held = split_holdout(whole, 0.25, 100, seed=0)
    assert {r.prompt for r in train}.isdisjoint(r.prompt for r in held)
    assert 0 < len(held) <= 10 and sorted([*train, *held], key=str) == sorted(whole, key=str)
    assert held.counts.usable == len(held) and train.counts.usable == len(train)
    assert list(split_holdout(whole, 0.25, 100, seed=0)[1]) == list(held)
    assert list(split_holdout(whole, 0.25, 100, seed=1)[1]) != list(held)
    assert len(split_holdout(whole, 0.5, 4, seed=0)[1]) <= 4


def test_holdout_never_takes_all_and_may_be_empty(encoded):
    one_prompt = encoded([row(i, prompt="same") for i in range(4)])
    train, held = split_holdout(one_prompt, 0.9, 100, seed=0)
    assert len(train) == 4 and len(held) == 0
    train, held = split_holdout(one_prompt, 0.0, 100, seed=0)
    assert len(train) == 4 and len(held) == 0


def test_files_of_several_frames_are_named_in_the_set(tmp_path):
    """Again where the set is read from its manifest; those of a group that is left out are not."""
    for seed in range(6):
        picture(seed).save(tmp_path / f"{seed}.gif", save_all=True, append_images=[picture(9)] * (seed % 2))
    entries = [{"prompt": "a", "chosen": f"{i}.gif", "rejected": f"{i + 1}.gif"} for i in (0, 2, 4)]
    entries.append({"prompt": "a", "chosen": "1.gif", "rejected": "1.gif"})
    path = write_jsonl(tmp_path / "p.jsonl", entries)
    for model in (Model(), Model()):
        encoded = encode(path, tmp_path / "c", model)
        assert [[name.rpartition("/")[2] for name in record.animated] for record in encoded] == [
            ["1.gif"],
            ["3.gif"],
            ["5.gif"],
        ]
        lines: list[str] = []
        tell_of_contents(encoded, lines.append)
        (line,) = [line for line in lines if "frames" in line]
        assert line.startswith("warning: 3 image files have several frames") and "1.gif" in line
    assert [
        note for note in summarise(read_preferences(DataConfig(path=str(path)))).notes if "3 image" in note
    ]
