"""Where sets lie: splits, files beside a table, URLs of fsspec, web addresses, errors of the hub."""

import json
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import fsspec
import pytest

from diffalign.config.schema import DataConfig
from diffalign.data import check_files, encode_preferences, read_preferences
from diffalign.errors import UserError
from tests.data.conftest import Model, png, row, write_jsonl, write_parquet


def read(path, **settings):
    return read_preferences(DataConfig(path=str(path), resolution=16, **settings))


def prompts(preferences):
    return [example.prompt for example in preferences]


# splits


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"),
        ("data/train-00000-of-00001", "data/val-00000-of-00001", "data/test-00000-of-00001"),
        ("train/0", "validation/0", "test/0"),
        ("pairs_train", "pairs_dev", "pairs_test"),
    ],
)
def test_the_split_that_is_named_is_read(tmp_path, names):
    for name in names:
        write_parquet(tmp_path / f"{name}.parquet", [row(0, prompt=name)])
    assert prompts(read(tmp_path)) == [names[0]]
    assert prompts(read(tmp_path, split="validation")) == [names[1]]
    assert prompts(read(tmp_path, split="test")) == [names[2]]
    assert sorted(prompts(read(tmp_path, split="all"))) == sorted(names)
    with pytest.raises(UserError, match=r"unknown split .*'nosuch'.*allowed: all, test, train, validation"):
        read(tmp_path, split="nosuch")


def test_splits_with_names_of_their_own(tmp_path):
    for name in ("train_0001", "train_0002"):
        write_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", [row(0, prompt=name)])
    assert prompts(read(tmp_path, split="train_0002")) == ["train_0002"]
    with pytest.raises(UserError, match="allowed: all, train_0001, train_0002"):
        read(tmp_path)


def test_files_without_a_split_are_the_training_set_and_beside_others_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [row(0, prompt="a")])
    write_parquet(tmp_path / "b.parquet", [row(1, prompt="b")])
    assert prompts(read(tmp_path)) == ["a", "b"]
    with pytest.raises(UserError, match="have no splits; allowed: train, all"):
        read(tmp_path, split="test")
    write_parquet(tmp_path / "train.parquet", [row(2, prompt="c")])
    preferences = read(tmp_path)
    assert prompts(preferences) == ["c"]
    assert preferences.notes[0] == "2 files of no split left out: a.parquet, b.parquet"


# files beside a table


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    (tmp_path / "here.png").write_bytes(png(1))
    entries = [{"prompt": "a", "chosen": "here.png", "rejected": "sub/gone.png"}] * 2
    preferences = read(write_jsonl(tmp_path / "p.jsonl", entries))
    check_files(preferences, DataConfig())  # some are there
    with pytest.raises(UserError) as caught:
        encode_preferences(Model(), preferences, DataConfig(resolution=16), tmp_path / "cache", False)
    assert f"looked for {tmp_path / 'sub' / 'gone.png'} (paths are relative to {tmp_path}" in str(
        caught.value
    )
    assert "the folder of p.jsonl; data.root names another" in str(caught.value)


def test_a_set_none_of_whose_files_is_there_is_refused_before_anything_long(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "x.png", "rejected": "y.png"}])
    with pytest.raises(UserError, match=r"none of the first 2 files was found; looked for .*x\.png"):
        check_files(read(path), DataConfig())


def test_the_root_of_a_tables_paths(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for number in (0, 1):
        (tmp_path / "elsewhere" / f"{number}.png").write_bytes(png(number))
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}])
    (example,) = read(path, root=str(tmp_path / "elsewhere"))
    assert [image.read() for image in example.images] == [png(0), png(1)]


# errors before a model is loaded


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_schema_error_of_json_comes_when_the_set_is_opened(tmp_path, suffix):
    good, bad = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}, {"prompt": "a", "better": "0.png"}
    text = "\n".join(map(json.dumps, (good, bad))) if suffix == "jsonl" else json.dumps([good, bad])
    (tmp_path / f"p.{suffix}").write_text(text)
    with pytest.raises(UserError, match=r"(line 2|entry 1): no preference columns; found better, prompt"):
        read(tmp_path / f"p.{suffix}")


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, OSError, ConnectionError])
def test_any_error_of_datasets_is_a_clear_word(monkeypatch, error):
    import datasets

    def fail(*_, **__):
        raise error("Dataset scripts are no longer supported, but found HPDv2.py")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError, match=r"'ymhao/HPDv2'.*cannot be loaded.*it has a loading script.*give its files"
    ):
        read("ymhao/HPDv2")


def test_the_configuration_of_a_hub_set(monkeypatch):
    import datasets

    asked = []

    def load(path, name, split, streaming):
        asked.append((path, name, split))
        return datasets.Dataset.from_list([row(0)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(list(read("zai-org/ImageRewardDB", config="8k_pair"))) == 1
    assert asked == [("zai-org/ImageRewardDB", "8k_pair", "train")]


# URLs of fsspec


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/bucket", recursive=True)


def test_tables_and_their_files_by_url(tmp_path, memory):
    write_parquet(tmp_path / "p.parquet", [row(0), row(1)])
    memory.pipe("/bucket/set/train.parquet", (tmp_path / "p.parquet").read_bytes())
    memory.pipe("/bucket/set/test.parquet", (tmp_path / "p.parquet").read_bytes())
    for place in (
        "memory://bucket/set",
        "memory://bucket/set/train.parquet",
        "memory://bucket/set/tr*.parquet",
    ):
        preferences = read(place)
        assert prompts(preferences) == ["prompt 0", "prompt 1"] and preferences.fingerprint
    entry = {"prompt": "a", "chosen": "1.png", "rejected": "memory://bucket/lists/2.png"}
    memory.pipe("/bucket/lists/p.jsonl", json.dumps(entry).encode())
    memory.pipe("/bucket/lists/1.png", png(1))
    memory.pipe("/bucket/lists/2.png", png(2))
    (example,) = read("memory://bucket/lists/p.jsonl")
    assert [image.read() for image in example.images] == [png(1), png(2)]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://bucket/none.parquet", "no such file"),
        (
            "nosuch://bucket/p.parquet",
            "'nosuch://bucket/p.parquet': Protocol not known: nosuch",
        ),
    ],
)
def test_a_url_that_cannot_be_read_is_named(memory, url, words):
    memory.pipe("/bucket/x", b"")
    with pytest.raises(UserError, match=words):
        read(url)


# web addresses


class Pictures(BaseHTTPRequestHandler):
    """Serves 1.png and 2.png, counts what is asked for, has lost the rest."""

    def __init__(self, asked, *rest):
        self.asked = asked
        super().__init__(*rest)

    def do_GET(self):
        self.asked.append(self.path)
        found = self.path in ("/1.png", "/2.png")
        self.send_response(200 if found else 404)
        self.end_headers()
        if found:
            self.wfile.write(png(int(self.path[1])))

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    asked: list[str] = []
    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(Pictures, asked))
    Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", asked
    web.shutdown()


def of_urls(tmp_path, base, names=(("1", "2"), ("1", "gone"))):
    rows = [
        {"caption": f"{a} {b}", "image_0_url": f"{base}/{a}.png", "image_1_url": f"{base}/{b}.png"}
        | {"label_0": 0.0, "label_1": 1.0, "has_label": True}
        for a, b in names
    ]
    return write_parquet(tmp_path / "urls.parquet", rows)


def encoded(path, tmp_path, **settings):
    config = DataConfig(path=str(path), resolution=16, downloads=str(tmp_path / "kept"), **settings)
    return encode_preferences(Model(), read_preferences(config), config, tmp_path / "cache", False)


def test_images_by_web_address_are_fetched_once_and_what_is_gone_is_reported(tmp_path, server):
    base, asked = server
    path = of_urls(tmp_path, base)
    assert read(path).schema == "Pick-a-Pic without images" and asked == []
    found = encoded(path, tmp_path)
    assert [(one.prompt, one.scores) for one in found] == [("1 2", (0, 1))]
    assert found.counts.unreadable == 1 and "gone.png is gone (status 404)" in found.counts.skipped[0]
    assert sorted(asked) == ["/1.png", "/2.png", "/gone.png"]
    (gone,) = [json.loads(line) for line in (tmp_path / "kept" / "gone.jsonl").read_text().splitlines()]
    assert gone == {"url": f"{base}/gone.png", "reason": "status 404"}
    (config,) = [DataConfig(path=str(path), resolution=8, downloads=str(tmp_path / "kept"))]
    encode_preferences(Model(), read_preferences(config), config, tmp_path / "again", False)
    assert len(asked) == 3  # nothing is asked for twice, what is gone neither


def test_a_limit_on_what_is_fetched(tmp_path, server):
    base, asked = server
    with pytest.raises(UserError, match=r"was not fetched: data\.max_downloads is 1"):
        encoded(of_urls(tmp_path, base), tmp_path, max_downloads=1)
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["p.jsonl", "*.jsonl", "tiny:pairs"])
def test_a_split_that_the_named_files_do_not_have_is_refused(tmp_path, name):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "1.png").write_bytes(png(1))
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}])
    path = name if name.startswith("tiny:") else tmp_path / name
    with pytest.raises(UserError, match=r"data.split is 'test', but .* no splits; allowed: train, all"):
        read(path, split="test")
    assert len([*read(path, split="all", limit=1)]) == 1


def test_files_that_are_named_are_read_whatever_their_names_say(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [row(0, prompt=split)])
    assert [one.prompt for one in read(tmp_path / "test.parquet")] == ["test"]
    assert [one.prompt for one in read(tmp_path / "*.parquet")] == ["test", "train"]
    assert [one.prompt for one in read(tmp_path / "*.parquet", split="test")] == ["test"]
    assert [one.prompt for one in read(tmp_path / "test.parquet", split="test")] == ["test"]
