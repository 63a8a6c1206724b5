"""Groups of any size: ranked lists, single likes, captions."""

import json
import re

import pytest
import torch

from diffalign.config.schema import DataConfig
from diffalign.data import PairSource, encode_preferences, fixed_batches, read_preferences
from diffalign.data.reading.examples import Counts
from diffalign.errors import UserError
from tests.data.conftest import Family, Model, picture, png, write_jsonl, write_parquet


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(entries): a file of those lines beside 0.png ... 9.png."""
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return lambda entries: write_jsonl(tmp_path / "p.jsonl", entries)


def read(path, **settings):
    return read_preferences(DataConfig(path=str(path), resolution=16, **settings))


def encode(path, tmp_path, model=None, **settings):
    config = DataConfig(path=str(path), **{"resolution": 16, **settings})
    return encode_preferences(model or Model(), read_preferences(config), config, tmp_path / "cache", False)


LISTS = [
    {"prompt": "a", "images": ["0.png", "1.png", "2.png"], "scores": [0.1, 0.9, 0.5]},
    {"prompt": "b", "images": ["3.png", "4.png"], "scores": [2, 2]},
    {"prompt": "c", "images": ["5.png", "6.png", "7.png", "8.png"], "scores": [-1, 3, 3, 0]},
    {"prompt": "d", "images": ["5.png", "6.png"], "scores": None},
    {"prompt": "e", "images": ["5.png", "6.png"], "scores": [1, None]},
]
LIKES = [
    {"prompt": "a", "image": "0.png", "liked": True},
    {"prompt": "b", "image": "1.png", "liked": False},
    {"prompt": "c", "image": "2.png", "liked": 1},
    {"prompt": "d", "image": "3.png", "liked": None},
]


def test_ranked_lists_of_any_length(jsonl, tmp_path):
    preferences = read(jsonl(LISTS))
    assert [example.scores for example in preferences] == [(0.1, 0.9, 0.5), (2, 2), (-1, 3, 3, 0)]
    assert preferences.counts.text == "2 lists, 1 tie, 2 rows without label, 0 unreadable"
    encoded = encode(jsonl(LISTS), tmp_path)
    assert encoded.counts.text == preferences.counts.text
    assert [len(record.images) for record in encoded] == [3, 2, 4]
    batch = next(fixed_batches(encoded, Family(), DataConfig(posterior="mean"), 3))
    assert batch.group.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert torch.equal(batch.score, torch.tensor([0.1, 0.9, 0.5, 2, 2, -1, 3, 3, 0]))
    assert batch.cond["text_embeds"][:, 0].tolist() == [97.0] * 3 + [98.0] * 2 + [99.0] * 4
    assert torch.equal(batch.x[4], encoded.moments(encoded[1].images[1])[0])


def test_lists_in_parquet(tmp_path):
    rows = [{"caption": "a", "images": [png(0), png(1), png(2)], "scores": [1.0, 2.0, 3.0]}]
    (example,) = read(write_parquet(tmp_path / "p.parquet", rows))
    assert example.scores == (1, 2, 3) and example.images[2].read() == png(2)


def test_likes_are_groups_of_one(jsonl, tmp_path):
    preferences = read(jsonl(LIKES))
    assert [example.scores for example in preferences] == [(1,), (0,), (1,)]
    assert preferences.counts == Counts(usable=3, unlabelled=1, liked=2, disliked=1)
    assert preferences.counts.text == "2 liked and 1 disliked images, 1 row without label, 0 unreadable"
    encoded = encode(jsonl(LIKES), tmp_path)
    batch = next(fixed_batches(encoded, Family(), DataConfig(), 3))
    assert batch.group.tolist() == [0, 1, 2] and batch.score.tolist() == [1, 0, 1]
    assert [example.scores for example in read(jsonl(LIKES), flip_labels=1.0)] == [(0,), (1,), (0,)]


def test_likes_only_are_demonstrations(jsonl):
    preferences = read(jsonl([LIKES[0]]))
    assert len(list(preferences)) == 1
    assert preferences.counts.text == "1 demonstration, 0 rows without label, 0 unreadable"


def test_images_and_prompts_are_demonstrations_where_those_are_asked_for(jsonl):
    path = jsonl([{"prompt": "a", "image": "0.png"}])
    assert [example.scores for example in read(path, view="demonstrations")] == [(1,)]
    with pytest.raises(
        UserError, match=r"line 1: no preference columns; found image, prompt; needed .*liked"
    ):
        list(read(path))


def test_a_folder_of_likes(tmp_path):
    for place, seed in (("liked/b", 1), ("disliked/a", 2), ("liked/c", 3)):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        picture(seed).save(tmp_path / f"{place}.png")
        (tmp_path / f"{place}.txt").write_text(f"a {place[-1]}\n")
    preferences = read(tmp_path)
    assert [(example.prompt, example.scores) for example in preferences] == [
        ("a a", (0,)),
        ("a b", (1,)),
        ("a c", (1,)),
    ]
    assert preferences.total == 3 and len(list(read(tmp_path, limit=2))) == 2
    (tmp_path / "liked/b.txt").unlink()
    with pytest.raises(UserError, match=r"no caption for liked/b; needed liked/b\.txt beside it"):
        read(tmp_path)
    (tmp_path / "w").mkdir()
    with pytest.raises(UserError, match="liked/ or disliked/ beside w/; which of them is meant"):
        read(tmp_path)


def test_an_empty_folder_of_likes(tmp_path):
    (tmp_path / "liked").mkdir()
    with pytest.raises(UserError, match="no images in liked/ and disliked/"):
        read(tmp_path)


def test_an_image_under_two_captions(jsonl, tmp_path):
    path = jsonl([{"prompt": "a", "altered": "b", "image": "0.png"}])
    model = Model()
    encoded = encode(path, tmp_path, model)
    assert encoded.counts.text == "1 caption pair, 0 ties, 0 rows without label, 0 unreadable"
    assert model.images == 1 and sorted(model.family.prompts) == ["", "a", "b"]
    source = PairSource(encoded, Family(), DataConfig(posterior="mean", prompt_dropout=1.0), 1)
    batch = source.batch(0)  # captions that are compared are not dropped
    assert batch.cond["text_embeds"][:, 0].tolist() == [97.0, 98.0] and batch.score.tolist() == [1, 0]
    assert torch.equal(batch.x[0], batch.x[1])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"images": ["0.png"], "scores": [1]},
            r"line 1: images is \['0.png'\]; allowed: a list of two or more",
        ),
        ({"images": "0.png", "scores": [1]}, "images is 0.png; allowed: a list of two or more"),
        ({"images": ["0.png", "1.png"], "scores": [1]}, "1 scores for 2 images; allowed: one score an image"),
        (
            {"images": ["0.png", "1.png"], "scores": 1},
            "scores is 1; allowed: a list of numbers, one an image",
        ),
        ({"images": ["0.png", "1.png"], "scores": [1, "good"]}, "a score is 'good'; a label is a number"),
        ({"images": ["0.png", 1], "scores": [1, 2]}, "column 'images': 1; an image is a path"),
        ({"image": "0.png", "liked": "maybe"}, "liked is 'maybe'; allowed: true, false, yes, no"),
        ({"image": "0.png", "liked": 2}, "liked is 2; allowed: true, false"),
        ({"image": "0.png", "liked": True, "weight": -1}, "weight is -1; allowed: a number from 0 on"),
        ({"image": "0.png", "liked": True, "weight": "x"}, "weight is 'x'; allowed: a number from 0 on"),
        (
            {"image": "0.png", "liked": True, "rewards": ["a"]},
            r"rewards is \['a'\]; allowed: for each of the 1",
        ),
        (
            {"images": ["0.png", "1.png"], "scores": [1, 2], "rewards": [[1, 2], [1]]},
            "rewards is .*; allowed: for each of the 2 images a number, or equally long lists",
        ),
        (
            {"images": ["0.png", "1.png"], "scores": [1, 2], "rewards": [1]},
            "allowed: for each of the 2 images",
        ),
        (
            {"images": ["0.png", "1.png"], "scores": [1, 2], "patches": ["0.png"]},
            "1 patches for 2 images; allowed: a map or null for each",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(jsonl, entry, message):
    with pytest.raises(UserError, match=message):
        list(read(jsonl([{"prompt": "a", **entry}])))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"prompt": "a", "images": None, "scores": [1, 2]}, "no image in column 'images'"),
        ({"prompt": "a", "images": ["0.png", None], "scores": [1, 2]}, "no image in column 'images'"),
        ({"prompt": None, "image": "0.png", "liked": True}, "no text in column 'prompt'"),
        ({"prompt": "a", "altered": 3, "image": "0.png"}, "no text in column 'altered'"),
    ],
)
def test_a_row_that_lacks_something_is_skipped_and_named(jsonl, entry, reason):
    preferences = read(jsonl([entry, LIKES[0]]))
    assert len(list(preferences)) == 1
    assert preferences.counts.skipped == (f"p.jsonl line 1: {reason}",)


def test_one_rewards_column_of_single_images_and_lists(jsonl):
    one = {"prompt": "a", "image": "0.png", "liked": True}
    two = {"prompt": "a", "images": ["0.png", "1.png"], "scores": [1, 2]}
    entries = [{**one, "rewards": 3}, {**one, "rewards": [1, 2]}, {**two, "rewards": [1, 2]}]
    entries += [{**two, "rewards": [[1, 2], [3, 4]]}, {**two, "rewards": None}]
    rewards = [example.rewards for example in read(jsonl(entries))]
    assert rewards == [((3,),), ((1, 2),), ((1,), (2,)), ((1, 2), (3, 4)), ()]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lists", "6 lists, 0 ties"),
        ("likes", r"\d liked and \d disliked images"),
        ("captions", "6 caption pairs, 0 ties"),
        ("experts", "6 demonstrations"),
    ],
)
def test_the_tiny_sets(tmp_path, name, text):
    encoded = encode(f"tiny:{name}", tmp_path, limit=6)
    assert len(encoded) == 6
    assert re.match(text + ", 0 rows without label, 0 unreadable", encoded.counts.text)
    again = Model()
    assert list(encode(f"tiny:{name}", tmp_path, again, limit=6)) == list(encoded) and not again.batches
    assert read(f"tiny:{name}").total == 4096


def test_json_of_a_row_may_be_a_list(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(LIKES[:2]))
    assert [example.where for example in read(tmp_path / "p.json")] == ["p.json entry 0", "p.json entry 1"]
