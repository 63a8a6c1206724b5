import json
import os
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from diffalign.config.schema import DataConfig
from diffalign.data import encode_preferences, read_preferences
from diffalign.data.reading.examples import Counts, Example, ImageRef, turn_labels
from diffalign.errors import UserError
from tests.data.conftest import Model, picture, png, row, write_jsonl, write_parquet
from tests.helpers import PUBLISHED_DATA

os.environ["HF_HUB_OFFLINE"] = "1"


def read(path, **settings):
    return read_preferences(DataConfig(path=str(path), resolution=16, **settings))


def scores(preferences):
    return [example.scores for example in preferences]


# tables


def test_pickapic_labels_ties_and_unlabelled_rows(tmp_path):
    nan = float("nan")
    rows = [
        row(0, (1.0, 0.0)),
        row(1, (0.0, 1.0)),
        row(2, (0.5, 0.5)),
        row(3, (0.0, 0.0), has_label=False),
        row(4, (nan, nan)),
        row(5, (None, None)),
        row(6, (1.0, 0.0), has_label=False),
    ]
    preferences = read(write_parquet(tmp_path / "p.parquet", rows))
    examples = list(preferences)
    assert [example.scores for example in examples] == [(1, 0), (0, 1), (0.5, 0.5)]
    assert [example.where for example in examples] == [f"p.parquet row {i}" for i in range(3)]
    assert [example.prompt for example in examples] == ["prompt 0", "prompt 1", "prompt 2"]
    assert examples[1].images[1].read() == png(3)
    assert preferences.counts == Counts(usable=2, ties=1, unlabelled=4)
    assert preferences.counts.text == "2 pairs, 1 tie, 4 rows without label, 0 unreadable"
    assert preferences.total == 7
    assert scores(preferences) == [(1, 0), (0, 1), (0.5, 0.5)]  # again


def test_the_published_set_counts_as_its_readme_says(tmp_path):
    path = PUBLISHED_DATA / "pairs" / "pickapic.parquet"
    config = DataConfig(path=str(path), resolution=32, buckets=True, bucket_step=8)
    encoded = encode_preferences(Model(), read_preferences(config), config, tmp_path, False)
    assert encoded.counts.text == "7 pairs, 1 tie, 1 row without label, 0 unreadable"
    assert [record.is_tie for record in encoded] == [False] * 6 + [True, False]
    assert encoded[7].target != (32, 32)  # the photographs are not square
    assert encoded[0].images[0].cut.original == (128, 128)


def test_uids_say_the_winner_where_there_are_no_labels(tmp_path):
    rows = []
    for seed, best in enumerate(["a", "b", "tie", "none", None]):
        entry = row(seed, best_image_uid=best, image_0_uid="a", image_1_uid="b")
        rows.append({name: value for name, value in entry.items() if "label" not in name})
    preferences = read(write_parquet(tmp_path / "p.parquet", rows))
    assert scores(preferences) == [(1, 0), (0, 1), (0.5, 0.5)]
    assert preferences.counts.unlabelled == 2


def test_glob_and_folder_read_the_files_in_order(tmp_path):
    for name in ("b", "a", "c"):
        write_parquet(tmp_path / f"{name}.parquet", [row(ord(name))])
    every = ["a.parquet row 0", "b.parquet row 0", "c.parquet row 0"]
    assert [example.where for example in read(tmp_path / "*.parquet")] == every
    assert [example.where for example in read(tmp_path)] == every


def test_limit_counts_rows(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [row(0), row(1, (None, None)), row(2), row(3)])
    preferences = read(path, limit=3)
    assert len(list(preferences)) == 2 and preferences.counts.unlabelled == 1 and preferences.total == 3


def test_trl_columns_with_image_structs(tmp_path):
    entry = {
        "prompt": "p",
        "chosen": {"bytes": png(1), "path": None},
        "rejected": {"bytes": png(2), "path": None},
    }
    (example,) = read(write_parquet(tmp_path / "p.parquet", [entry]))
    assert example.scores == (1, 0) and example.images[0].read() == png(1)


def test_fingerprint_follows_the_file(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [row(0)])
    first = read(path).fingerprint
    assert first == read(path).fingerprint != read(path, flip_labels=1.0).fingerprint
    write_parquet(path, [row(0), row(1)])
    assert read(path).fingerprint != first


def test_rows_without_prompt_or_image_are_named(tmp_path):
    rows = [row(0), {**row(1), "caption": None}, {**row(2), "jpg_1": None}]
    preferences = read(write_parquet(tmp_path / "p.parquet", rows))
    assert len(list(preferences)) == 1
    assert preferences.counts.skipped == (
        "p.parquet row 1: no text in column 'caption'",
        "p.parquet row 2: no image in column 'jpg_1'",
    )


# hub datasets (a local folder stands in: the loader is the same)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_loader(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    write_parquet(tmp_path / "set" / "train.parquet", [row(0), row(1, (0.5, 0.5)), row(2, (None, None))])
    preferences = read(tmp_path / "set", format="hub", streaming=streaming)
    examples = list(preferences)
    assert [example.scores for example in examples] == [(1, 0), (0.5, 0.5)]
    assert examples[0].images[0].read() == png(0)
    assert preferences.counts == Counts(1, 1, 1)
    assert preferences.total == (None if streaming else 3)


def test_hub_dataset_that_cannot_be_had():
    with pytest.raises(UserError, match=r"'nobody/nothing'.*hub dataset"):
        read("nobody/nothing")


# folders


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)


@pytest.mark.parametrize("sides", [("w", "l"), ("chosen", "rejected")])
def test_two_folders(tmp_path, sides):
    for stem, seed in (("b", 1), ("a", 2)):
        save(tmp_path / sides[0] / f"{stem}.png", seed)
        save(tmp_path / sides[1] / f"{stem}.jpg", seed + 10)
        (tmp_path / sides[0] / f"{stem}.txt").write_text(f"a {stem}\n")
    examples = list(read(tmp_path))
    assert [example.prompt for example in examples] == ["a a", "a b"]
    assert [example.images[0].source for example in examples] == [
        tmp_path / sides[0] / f"{s}.png" for s in "ab"
    ]
    assert examples[0].images[1].source == tmp_path / sides[1] / "a.jpg"
    assert scores(examples) == [(1, 0), (1, 0)]


def test_suffixes(tmp_path):
    save(tmp_path / "cat_w.png", 1)
    save(tmp_path / "cat_l.png", 2)
    (tmp_path / "cat.txt").write_text("a cat")
    (example,) = read(tmp_path)
    assert example.prompt == "a cat" and example.images[0].source == tmp_path / "cat_w.png"


def test_one_sided_folder_is_an_error_that_names_the_image(tmp_path):
    save(tmp_path / "w" / "a.png", 1)
    save(tmp_path / "w" / "b.png", 2)
    save(tmp_path / "l" / "a.png", 3)
    with pytest.raises(UserError, match=r"no rival in l/ for b\.png"):
        read(tmp_path)


def test_a_folder_with_one_side_only(tmp_path):
    save(tmp_path / "w" / "a.png", 1)
    with pytest.raises(UserError, match=r"no rival in l/ for a\.png"):
        read(tmp_path)


def test_suffixes_with_a_stray_and_a_lone_image(tmp_path):
    save(tmp_path / "a_w.png", 1)
    with pytest.raises(UserError, match=r"no rival in NAME_l for a_w\.png"):
        read(tmp_path)
    save(tmp_path / "a_l.png", 1)
    save(tmp_path / "b.png", 1)
    with pytest.raises(UserError, match=r"neither _w nor _l ends the name of b\.png"):
        read(tmp_path)


def test_a_missing_caption_and_a_double_name(tmp_path):
    save(tmp_path / "w" / "a.png", 1)
    save(tmp_path / "l" / "a.png", 3)
    with pytest.raises(UserError, match=r"no caption for a; needed a\.txt"):
        read(tmp_path)
    save(tmp_path / "w" / "a.jpg", 1)
    with pytest.raises(UserError, match=r"a\.jpg and a\.png have the same name"):
        read(tmp_path)


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(UserError, match="a folder without preferences; needed w/ and l/"):
        read(tmp_path)


# json lines


@pytest.mark.parametrize("names", [("chosen", "rejected"), ("path1", "path2")])
def test_jsonl_paths_are_relative_to_the_file(tmp_path, names):
    save(tmp_path / "images" / "1.png", 1)
    save(tmp_path / "images" / "2.png", 2)
    entry = {"prompt": "x\u2028y", names[0]: "images/1.png", names[1]: "images/2.png"}
    (tmp_path / "p.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\n\n")
    (tmp_path / "p.json").write_text(json.dumps([entry]))
    for name, where in (("p.jsonl", "p.jsonl line 1"), ("p.json", "p.json entry 0")):
        (example,) = read(tmp_path / name)
        assert example.prompt == "x\u2028y" and example.scores == (1, 0) and example.where == where
        assert example.images[0].source == tmp_path / "images" / "1.png"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a", "chosen": "1.png"}',
            r"line 2: no preference columns; found chosen, prompt; needed .*rejected",
        ),
        ('{"prompt": "a", ', "line 2: not JSON"),
        ('["a"]', "line 2: .*needed an object"),
        (
            '{"prompt": "a", "chosen": 1, "rejected": "2.png"}',
            "line 2, column 'chosen': 1; an image is a path",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "chosen": "1.png", "rejected": "2.png"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(read(path))


# bad inputs


def test_corrupt_parquet(tmp_path):
    path = tmp_path / "p.parquet"
    path.write_bytes(b"PAR1 this is no parquet PAR1")
    with pytest.raises(UserError, match=r"p\.parquet: not readable as parquet"):
        read(path)


def test_parquet_damaged_inside(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [row(i) for i in range(8)])
    content = bytearray(path.read_bytes())
    content[100:2000] = b"\x00" * 1900
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"p\.parquet: damaged after row 0"):
        list(read(path))


def test_missing_columns_are_named_with_those_found(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [{"caption": "a", "image": b"", "score": 1.0}])
    with pytest.raises(
        UserError, match=r"found caption, image, score; needed caption .*jpg_0, jpg_1, label_0, label_1"
    ):
        read(path)


def test_a_label_that_is_no_number(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [row(0, ("left", "right"))])
    with pytest.raises(UserError, match=r"row 0: label_0 is 'left'; a label is a number"):
        list(read(path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "data.path is empty"),
        ("missing.parquet", "missing.parquet.*no parquet file"),
        ("missing/*.parquet", "no parquet file"),
        ("missing.jsonl", "no such file"),
        ("./missing", "no such file or folder"),
        ("missing", "no such file or folder"),
        ("tiny:pears", "unknown embedded data set 'tiny:pears'; did you mean tiny:pairs"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "p.xlsx").write_text("a,b")
    with pytest.raises(UserError, match=r"cannot tell the format of \.xlsx files; allowed: \.parquet"):
        read(tmp_path / "p.xlsx")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resolution", 20),
        ("resolution", 0),
        ("limit", 0),
        ("prompt_dropout", 1.5),
        ("flip_labels", -0.1),
        ("holdout", 1.0),
        ("max_holdout", -1),
        ("cache_batch_size", 0),
        ("workers", -1),
    ],
)
def test_settings_out_of_range(field, value):
    config = replace(DataConfig(path="tiny:pairs", resolution=16), **{field: value})
    with pytest.raises(UserError, match=rf"data\.{field} is {value}; allowed: "):
        read_preferences(config)


def test_bucket_step_and_format():
    with pytest.raises(UserError, match=r"data\.bucket_step is 64; allowed: .*resolution \(16\)"):
        read("tiny:pairs", buckets=True)
    with pytest.raises(UserError, match=r"unknown data.format 'parkett'; did you mean parquet"):
        read("pairs.parquet", format="parkett")


# labels turned round


def test_turning_labels_is_its_own_inverse():
    images = (ImageRef(b"0"), ImageRef(b"1"), ImageRef(b"2"))
    for values in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (3.0, 1.0, 2.0)):
        example = Example("p", images[: len(values)], values, "here")
        assert turn_labels(turn_labels(example)) == example
    assert turn_labels(Example("p", images, (3.0, 1.0, 2.0), "here")).scores == (1.0, 3.0, 2.0)


def test_flip_labels_turns_all_or_a_share_by_seed_and_content(tmp_path):
    rows = [row(i, (1.0, 0.0)) for i in range(60)] + [row(60, (0.5, 0.5))]
    path = write_parquet(tmp_path / "p.parquet", rows)
    assert scores(read(path, flip_labels=1.0)) == [(0, 1)] * 60 + [(0.5, 0.5)]
    config = DataConfig(path=str(path), resolution=16, flip_labels=0.3)
    turned = scores(read_preferences(config, seed=1))
    assert turned == scores(read_preferences(config, seed=1)) != scores(read_preferences(config, seed=2))
    assert 8 <= turned.count((0.0, 1.0)) <= 28
    # by content: the rows in another order are the same rows that are turned
    backwards = write_parquet(tmp_path / "q.parquet", rows[::-1])
    assert scores(read_preferences(replace(config, path=str(backwards)), seed=1)) == turned[::-1]


def test_tiny_pairs():
    from diffalign import tiny

    try:
        tiny.pairs_path()
    except FileNotFoundError:
        pytest.skip("the embedded pairs are not built yet")
    preferences = read("tiny:pairs", limit=3)
    for example in preferences:
        assert [Image.open(BytesIO(image.read())).size for image in example.images] == [(32, 32)] * 2


def test_unreadable_jsonl_images_are_left_to_the_encoder(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "no.png", "rejected": "no.png"}])
    config = DataConfig(path=str(path), resolution=16)
    with pytest.raises(
        UserError,
        match=r"0 pairs.*1 unreadable; p\.jsonl line 1: no\.png is unreadable \(No such",
    ):
        encode_preferences(Model(), read_preferences(config), config, tmp_path / "cache", False)


def test_streaming_is_of_hub_sets(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [row(0)])
    with pytest.raises(
        UserError, match=r"data\.streaming is true, but the set is parquet, .* allowed: false"
    ):
        read(path, streaming=True)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("winner", "loser"),
        ("win", "lose"),
        ("preferred", "dispreferred"),
        ("chosen_image", "rejected_image"),
        ("Chosen_Path", "Rejected_Path"),
        ("image_w", "image_l"),
    ],
)
def test_an_error_names_the_setting_that_reads_a_pair_of_columns(tmp_path, better, worse):
    for name, seed in (("1.png", 1), ("2.png", 2)):
        save(tmp_path / name, seed)
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"text": "a", worse: "1.png", better: "2.png"}))
    columns = (f"prompt=text,chosen={better},rejected={worse}",)
    with pytest.raises(UserError, match=f"data.columns {columns[0]}$"):
        read(path)
    (example,) = read(path, columns=tuple(columns[0].split(",")))
    assert example.images[0].name == "2.png" and example.scores == (1, 0)


def test_lone_quotation_marks_in_a_tsv_take_in_no_lines(tmp_path):
    for name, seed in (("1.png", 1), ("2.png", 2)):
        save(tmp_path / name, seed)
    rows = ['"The Starry Night" as a mosaic', '"a lone mark', "a cat", 'a 12" ruler']
    text = "".join(f"{prompt}\t1.png\t2.png\n" for prompt in ("prompt\tchosen\trejected", *rows))
    (tmp_path / "p.tsv").write_text(text.replace("rejected\t1.png\t2.png", "rejected"))
    assert [example.prompt for example in read(tmp_path / "p.tsv")] == rows


def test_a_quoted_tsv_is_read_as_one(tmp_path):
    (tmp_path / "p.tsv").write_text(
        'prompt\tchosen\trejected\n"a ""cat""\ton a mat"\t1.png\t2.png\na dog\t1.png\t2.png\n'
    )
    assert [example.prompt for example in read(tmp_path / "p.tsv")] == ['a "cat"\ton a mat', "a dog"]


@pytest.mark.parametrize("prompt", ['"The Starry Night" as a mosaic', '"a lone mark'])
def test_a_lone_quotation_mark_in_a_csv_is_named(tmp_path, prompt):
    path = tmp_path / "p.csv"
    path.write_text(f"prompt,chosen,rejected\na dog,1.png,2.png\n{prompt},1.png,2.png\na cat,1.png,2.png\n")
    with pytest.raises(UserError, match=r"p\.csv line 3: not readable as csv .* those within it are doubled"):
        list(read(path))
