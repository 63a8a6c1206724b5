"""Published preference sets: a test a row of the table, on files made in that schema.

Each says which prompts, scores and votes must be read of it. The pictures are numbered, so that what is whose
is seen in the bytes.
"""

import io
import json
import tarfile
from pathlib import Path

import pytest

from diffalign.config.schema import DataConfig
from diffalign.data import read_preferences
from diffalign.errors import UserError
from tests.data.conftest import png, write_jsonl, write_parquet

A, B, C = png(1), png(2), png(3)


def struct(content):
    return {"bytes": content, "path": None}


def read(path, **settings):
    return read_preferences(DataConfig(path=str(path), resolution=16, **settings))


def parquet(tmp_path, rows, **settings):
    return read(write_parquet(tmp_path / "p.parquet", rows), **settings)


def as_json(tmp_path, rows, name="p.json", **settings):
    for number, content in enumerate((A, B, C)):
        for folder in ("", "images", "winvideos", "losevideos"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{number}.png").write_bytes(content)
    (tmp_path / name).write_text(json.dumps(rows))
    return read(tmp_path / name, **settings)


def told(preferences):
    """(prompt, scores, votes, number of each picture) of every group."""
    number = {A: 1, B: 2, C: 3}
    return [
        (
            example.prompt,
            tuple(round(score, 6) for score in example.scores),
            tuple(round(vote, 6) for vote in example.votes),
            tuple(number[image.read()] for image in example.images),
        )
        for example in preferences
    ]


RICH = {"aesthetics_score": 0.5, "artifact_score": 0.6}


def rated(*scores):
    return dict(zip(("alignment_score", "coherence_score", "style_score"), scores, strict=True))


PICK = {"caption": "a cat", "jpg_0": A, "jpg_1": B, "has_label": True}
URLS = {"caption": "a cat", "image_0_url": "0", "image_1_url": "1", "has_label": True}
RAPIDATA = {"prompt": "a cat", "image1": struct(A), "image2": struct(B), "model1": "x", "model2": "y"}
WEIGHTED = {
    **RAPIDATA,
    "weighted_results_image1_preference": 0.7,
    "weighted_results_image2_preference": 0.3,
    "weighted_results_image1_coherence": 0.2,
    "weighted_results_image2_coherence": 0.8,
    "weighted_results_image1_alignment": 0.5,
    "weighted_results_image2_alignment": 0.5,
    "detailed_results_preference": "[]",
}

PARQUET = {
    "Pick-a-Pic": (
        [
            {**PICK, "label_0": 0.0, "label_1": 1.0, "are_different": True},
            {**PICK, "label_0": 0.5, "label_1": 0.5, "are_different": True},
            {**PICK, "label_0": 1.0, "label_1": 0.0, "are_different": False},
        ],
        [("a cat", (0, 1), (), (1, 2)), ("a cat", (0.5, 0.5), (), (1, 2))],
    ),
    "Rapidata (votes)": (
        [
            {**RAPIDATA, "votes_image1": 6, "votes_image2": 2},
            {**RAPIDATA, "votes_image1": 4, "votes_image2": 4},
            {**RAPIDATA, "votes_image1": 0, "votes_image2": 0},
        ],
        [("a cat", (0.75, 0.25), (0.75, 0.25), (1, 2)), ("a cat", (0.5, 0.5), (0.5, 0.5), (1, 2))],
    ),
    "Rapidata (weighted results)": ([WEIGHTED], [("a cat", (0.7, 0.3), (0.7, 0.3), (1, 2))]),
    "open-image-preferences-more-results": (
        [{**RAPIDATA, "aggregated_results": '{"image1": 1, "image2": 3}'}],
        [("a cat", (0.25, 0.75), (0.25, 0.75), (1, 2))],
    ),
    "chosen and rejected": (
        [{"prompt": "a cat", "chosen": struct(B), "rejected": struct(A)}],
        [("a cat", (1, 0), (), (2, 1))],
    ),
    "ImageRewardDB": (
        [
            {"image": struct(A), "prompt_id": "7", "prompt": "a cat", "rank": 3, "overall_rating": 2},
            {"image": struct(B), "prompt_id": "7", "prompt": "a cat", "rank": 1, "overall_rating": 6},
            {"image": struct(C), "prompt_id": "7", "prompt": "a cat", "rank": 3, "overall_rating": 2},
        ],
        [("a cat", (-3, -1, -3), (), (1, 2, 3))],
    ),
    "ImageRewardDB (pairs)": (
        [{"prompt": "a cat", "img_better": struct(B), "img_worse": struct(A)}],
        [("a cat", (1, 0), (), (2, 1))],
    ),
    "Rapidata (rich feedback)": (
        [
            {"image": struct(A), "prompt": "cat", **rated(4.0, 4.0, 4.0)},
            {"image": struct(B), "prompt": "cat", **rated(2.0, 3.0, 4.0)},
            {"image": struct(C), "prompt": "dog", **rated(2.0, 2.0, 2.0)},
        ],
        [("cat", (4, 3), (), (1, 2)), ("dog", (0,), (), (3,))],
    ),
    "RichHF-18k": (
        [
            {"image": struct(A), "caption": "cat", **RICH, "overall_score": 0.9},
            {"image": struct(B), "caption": "dog", **RICH, "overall_score": 0.1},
        ],
        [("cat", (1,), (), (1,)), ("dog", (0,), (), (2,))],
    ),
    "VisionRewardDB-Image": (
        [
            {
                "image": struct(content),
                "prompt": "cat",
                "annotation": {"richness": 1},
                "meta_result": answers,
                "meta_mask": [1, 1, 0, 1],
            }
            for content, answers in ((A, [1, 0, 1, 0]), (B, [1, 1, 0, 1]))
        ],
        [("cat", (0.333333, 1), (), (1, 2))],
    ),
    "GenAI-Bench": (
        [
            {
                "Index": "1",
                "Prompt": "cat",
                "HumanRatings": {"DALLE_3": [5, 5, 4], "SDXL_Base": [2, 3, 1]},
                "DALLE_3": struct(A),
                "SDXL_Base": struct(B),
            }
        ],
        [("cat", (4.666667, 2), (), (1, 2))],
    ),
}  # fmt: skip

JSON = {
    "HPDv3": (
        [
            {"prompt": "cat", "path1": "0.png", "path2": "1.png", "confidence": 0.9, "choice_dist": [9, 1]},
            {"prompt": "cat", "path1": "0.png", "path2": "1.png", "confidence": None, "choice_dist": [6, 4]},
            {"prompt": "cat", "path1": "0.png", "path2": "1.png", "confidence": None, "choice_dist": None},
        ],
        [
            ("cat", (1, 0), (0.9, 0.1), (1, 2)),
            ("cat", (1, 0), (0.6, 0.4), (1, 2)),
            ("cat", (1, 0), (), (1, 2)),
        ],
    ),
    "HPDv2 (train)": (
        [
            {"human_preference": [1, 0], "prompt": "cat", "file_path": ["0.png", "1.png"], "user_hash": "x"},
            {"human_preference": [0, 1], "prompt": "cat", "file_path": ["0.png", "1.png"], "user_hash": "x"},
        ],
        [("cat", (1, 0), (), (1, 2)), ("cat", (0, 1), (), (1, 2))],
    ),
    "HPDv2 (train), the other form": (
        [{"human_preference": [0, 1], "prompt": "cat", "image_path": ["0.png", "1.png"]}],
        [("cat", (0, 1), (), (1, 2))],
    ),
    "HPDv2 (test)": (
        [
            {
                "prompt": "cat",
                "image_path": ["0.png", "1.png", "2.png"],
                "rank": [2, 1, 2],
                "raw_annotations": [[1]],
            }
        ],
        [("cat", (-2, -1, -2), (), (1, 2, 3))],
    ),
    "ImageRewardDB (json)": (
        [
            {"image_path": "images/0.png", "prompt_id": "1", "prompt": "cat", "rank": 2},
            {"image_path": "images/1.png", "prompt_id": "2", "prompt": "dog", "rank": 1},
            {"image_path": "images/2.png", "prompt_id": "1", "prompt": "cat", "rank": 1},
        ],
        [("cat", (-2, -1), (), (1, 3))],
    ),
    "ImageGen-CoT-Reward": (
        [
            {
                "images": ["0.png", "1.png"],
                "conversations": [
                    {"from": "human", "value": f"Judge.\nText Caption: a cat\n{more}"},
                    {"from": "gpt", "value": f"<think>Image 1 is better in style</think>{answer}"},
                ],
            }
            for more, answer in (("", "<answer>Image 2 is better</answer>"), ("Now!", "Image 1 is better"))
        ],
        [("a cat", (0, 1), (), (1, 2)), ("a cat", (1, 0), (), (1, 2))],
    ),
    "Flow-Factory (preferences)": (
        [
            {
                "schema_version": 2,
                "input": {"prompt": "cat", "media": []},
                "supervision": {
                    "type": "preference",
                    "chosen": {"media": [{"type": "image", "path": "1.png"}]},
                    "rejected": {"media": [{"type": "image", "path": "0.png"}]},
                },
                "metadata": {"annotator": "x"},
            }
        ],
        [("cat", (1, 0), (), (2, 1))],
    ),
    "Flow-Factory (demonstrations)": (
        [
            {
                "schema_version": 2,
                "input": {"prompt": "cat"},
                "supervision": {
                    "type": "demonstration",
                    "target": {"media": [{"type": "image", "path": "1.png"}]},
                },
            }
        ],
        [("cat", (1,), (), (2,))],
    ),
}

VIDEOS = {
    "VideoAlign": (
        {"prompt": "cat", "path_A": "0.png", "path_B": "1.png", "VQ": "A", "TA": "same", "Overall": "B"},
        ("cat", (0, 1), (), (1, 2)),
    ),
    "Rapidata (videos)": (
        {
            "prompt": "cat", "file_name1": "0.png", "file_name2": "1.png",
            "weighted_results1_Preference": 0.6, "weighted_results2_Preference": 0.4,
            "weighted_results1_Coherence": 0.1, "weighted_results2_Coherence": 0.9,
        },
        ("cat", (0.6, 0.4), (0.6, 0.4), (1, 2)),
    ),
    "VisionRewardDB-Video": (
        {"prompt": "cat", "video1_path": "0.png", "video2_path": "1.png", "human_preference": "B"},
        ("cat", (0, 1), (), (1, 2)),
    ),
    "VisionRewardDB-Video (annotations)": (
        {"prompt": "cat", "video_path": "0.png", "meta_result": [1, 1, 0], "meta_mask": [1, 1, 1]},
        ("cat", (1,), (), (1,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARQUET)
def test_a_published_parquet(tmp_path, name):
    rows, expected = PARQUET[name]
    preferences = parquet(tmp_path, rows)
    assert preferences.schema == name and told(preferences) == expected
    assert len(expected) == preferences.counts.usable + preferences.counts.ties
    print(f"{name}: {preferences.counts.text}")


@pytest.mark.parametrize("name", JSON)
def test_a_published_json(tmp_path, name):
    rows, expected = JSON[name]
    preferences = as_json(tmp_path, rows)
    assert preferences.schema == name.partition(", the")[0] and told(preferences) == expected
    print(f"{name}: {preferences.counts.text}")


@pytest.mark.parametrize("name", VIDEOS)
def test_a_published_set_of_videos(tmp_path, name):
    row, expected = VIDEOS[name]
    preferences = as_json(tmp_path, [row], frames=1)
    assert preferences.schema == name and told(preferences) == [expected]
    with pytest.raises(UserError, match=r"holds videos; data\.frames is null"):
        read(tmp_path / "p.json")


def test_video_dpo(tmp_path):
    as_json(tmp_path, [{"prompt": "x", "chosen": "0.png", "rejected": "1.png"}])
    (tmp_path / "winvideos" / "000001.mp4").write_bytes(A)
    (tmp_path / "losevideos" / "000000.mp4").write_bytes(B)
    pair = {"video1": 2, "video2": 1, "frame_caption": "a cat", "label": 0}
    (tmp_path / "pair.json").write_text(json.dumps([pair]))
    preferences = read(tmp_path / "pair.json", frames=1)
    assert told(preferences) == [("a cat", (1, 0), (), (1, 2))] and preferences.schema == "VideoDPO"


def test_video_feedback(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "r1.mp4").write_bytes(A)
    (tmp_path / "videos" / "r2.mp4").write_bytes(B)
    ratings = ("visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment")
    rows = [
        {
            "id": name,
            "images": ["a.jpg", "b.jpg"],
            "text prompt": "cat",
            "video link": "x",
            "conversations": [],
        }
        | dict.fromkeys((*ratings, "factual consistency"), rating)
        for name, rating in (("r1", 2), ("r2", 3))
    ]
    write_parquet(tmp_path / "p.parquet", rows)
    preferences = read(tmp_path / "p.parquet", frames=1)
    assert told(preferences) == [("cat", (2, 3), (), (1, 2))] and preferences.schema == "VideoFeedback"


def test_labels_of_a_set_with_several(tmp_path):
    assert told(parquet(tmp_path, [WEIGHTED], label="coherence")) == [
        ("a cat", (0.2, 0.8), (0.2, 0.8), (1, 2))
    ]
    assert told(parquet(tmp_path, [WEIGHTED], label="alignment")) == [
        ("a cat", (0.5, 0.5), (0.5, 0.5), (1, 2))
    ]
    with pytest.raises(
        UserError, match=r"unknown label .*'style'.*allowed: alignment, coherence, preference"
    ):
        parquet(tmp_path, [WEIGHTED], label="style")
    row, _ = VIDEOS["VideoAlign"]
    assert told(as_json(tmp_path, [row], frames=1, label="VQ"))[0][1] == (1, 0)


def test_pairs_in_csv(tmp_path):
    for number, content in enumerate((A, B)):
        (tmp_path / f"{number}.png").write_bytes(content)
    (tmp_path / "p.csv").write_text('prompt,chosen,rejected\n"a cat, red",1.png,0.png\n')
    assert told(read(tmp_path / "p.csv")) == [("a cat, red", (1, 0), (), (2, 1))]


# pairs that were made from a source image


EDITS = {
    "EditReward": {"prompt": "make it red", "path_src": "0.png", "path1": "1.png", "path2": "2.png"},
    "a source of our own": {"instruction": "x", "source": "0.png", "chosen": "1.png", "rejected": "2.png"},
    "a source beside the pair": {"prompt": "x", "image": "0.png", "chosen": "1.png", "rejected": "2.png"},
    "a list of one source": {"prompt": "x", "images": ["0.png"], "chosen": "1.png", "rejected": "2.png"},
    "Rapidata's image to video": {
        "prompt": "x", "prompt_asset": "0.png", "file_name1": "1.png", "file_name2": "2.png",
        "weighted_results1_Preference": 1, "weighted_results2_Preference": 0,
    },
    "Flow-Factory with conditions": {
        "schema_version": 2, "input": {"prompt": "x", "media": [{"type": "image", "path": "0.png"}]},
        "supervision": {"chosen": {"media": [{"path": "1.png"}]}, "rejected": {"media": [{"path": "2.png"}]}},
    },
}  # fmt: skip


def source_of(example):
    return example.source and Path(example.source.source).name


@pytest.mark.parametrize("name", EDITS)
def test_the_source_of_an_edit_is_read(tmp_path, name):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([EDITS[name]]))
    (example,) = read(path, frames=1)
    assert source_of(example) == "0.png"
    assert [Path(image.source).name for image in example.images] == ["1.png", "2.png"]
    assert example.scores == (1.0, 0.0)


def test_a_source_in_parquet_and_by_a_column_of_its_own_name(tmp_path):
    row = {
        "caption": "a",
        "chosen": A,
        "rejected": B,
        "before": {"bytes": C, "path": "c.png"},
        "source": "web",
    }
    assert next(iter(parquet(tmp_path, [row]))).source is None  # text that says where a row comes from
    (example,) = parquet(tmp_path, [row], columns=("source=before",))
    assert example.source.read() == C
    missing = parquet(tmp_path, [{**row, "before": None}, row], columns=("source=before",))
    assert len(list(missing)) == 1 and "no image in column 'source'" in missing.counts.skipped[0]


def test_a_tie_of_an_edit_is_a_tie(tmp_path):
    rows = [{**EDITS["EditReward"], "tie_case": tie, "confidence": None} for tie in (True, False)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert [example.scores for example in read(tmp_path / "rows.json")] == [(0.5, 0.5), (1.0, 0.0)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"path_src": "0.png"}, "columns 'path_src' and 'image' may hold the source"),
        ({"image": ["0.png", "1.png"]}, "image holds 2 inputs beside the prompt"),
        ({"input_video": "0.mp4"}, "column 'input_video' holds a video"),
    ],
)
def test_a_source_that_cannot_be_told_is_an_error(tmp_path, more, message):
    row = EDITS["a source beside the pair"] | more
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=message):
        list(read(tmp_path / "rows.json"))


def test_several_inputs_of_flow_factory_are_an_error(tmp_path):
    row = json.loads(json.dumps(EDITS["Flow-Factory with conditions"]))
    row["input"]["media"].append({"type": "image", "path": "3.png"})
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=r"input\.media holds 2 inputs"):
        list(read(tmp_path / "rows.json"))


def test_rows_of_one_image_each_have_no_source(tmp_path):
    row = {"image": A, "prompt": "x", "prompt_id": "1", "rank": 1, "source_image": B}
    with pytest.raises(UserError, match="'source_image' is a source image, and rows of ImageRewardDB"):
        parquet(tmp_path, [row])


def test_columns_that_are_not_used_are_named_once(tmp_path):
    row = {**PICK, "label_0": 1.0, "label_1": 0.0, "depth_map": A, "comment": "nice", "seed": 3}
    (note,) = parquet(tmp_path, [row, row]).notes
    assert note == "columns that are not used: comment, depth_map"


# column mapping


def test_columns_by_name(tmp_path):
    rows = [{"txt": "cat", "img_better": A, "img_worse": B, "extra": 1}]
    mapped = ("prompt=txt", "chosen=img_better", "rejected=img_worse")
    assert told(parquet(tmp_path, rows, columns=mapped)) == [("cat", (1, 0), (), (1, 2))]


@pytest.mark.parametrize(
    ("row", "columns", "scores", "votes"),
    [
        ({"n": [3, 1]}, ("votes=n",), (0.75, 0.25), (0.75, 0.25)),
        ({"up": 1, "down": 3}, ("votes_0=up", "votes_1=down"), (0.25, 0.75), (0.25, 0.75)),
        ({"pick": "B"}, ("label=pick",), (0, 1), ()),
        ({"pick": 0}, ("label=pick",), (1, 0), ()),
        ({"l": {"a": 1.0, "b": 0.0}}, ("label_0=l.a", "label_1=l.b"), (1, 0), ()),
    ],
)
def test_labels_by_name(tmp_path, row, columns, scores, votes):
    pair = ("image_0=x", "image_1=y", "prompt=p")
    row = {"p": "cat", "x": A, "y": B, **row}
    assert told(parquet(tmp_path, [row], columns=(*pair, *columns))) == [("cat", scores, votes, (1, 2))]


def test_scores_of_a_list_by_name(tmp_path):
    row = {"p": "cat", "files": ["0.png", "1.png", "2.png"], "q": [1, 3, 2]}
    columns = ("prompt=p", "images=files", "scores=q")
    assert told(as_json(tmp_path, [row], columns=columns)) == [("cat", (1, 3, 2), (), (1, 2, 3))]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (("prompt",), "'prompt'; allowed: role=column"),
        (("winner=a",), "unknown role of data.columns 'winner'.*allowed: altered, are_different, chosen"),
        (("prompt=captoin",), "prompt=captoin: no such column; did you mean caption\\?"),
    ],
)
def test_a_wrong_mapping_is_named(tmp_path, columns, words):
    with pytest.raises(UserError, match=words):
        parquet(tmp_path, [{**PICK, "label_0": 1.0, "label_1": 0.0}], columns=columns)


# votes


def voted(tmp_path, **settings):
    rows = [{**RAPIDATA, "votes_image1": n, "votes_image2": 10 - n} for n in (9, 4, 5)]
    return parquet(tmp_path, rows, **settings)


def test_votes_as_a_weight_and_as_a_majority(tmp_path):
    weighted = list(voted(tmp_path, votes="weight"))
    assert [example.weight for example in weighted] == pytest.approx([0.8, 0.2, 1.0])
    majority = list(voted(tmp_path, votes="majority"))
    assert [example.scores for example in majority] == [(1, 0), (0, 1), (0.5, 0.5)]
    assert all(example.votes == () for example in majority + weighted)


def test_pairs_whose_votes_do_not_agree_are_left_out_and_counted(tmp_path):
    preferences = voted(tmp_path, min_agreement=0.7)
    assert [example.votes[0] for example in preferences] == [0.9]
    assert preferences.counts.undecided == 2 and "2 of weight 0 or below" in preferences.counts.text


def test_turned_labels_turn_votes(tmp_path):
    assert told(voted(tmp_path, flip_labels=1.0))[0] == ("a cat", (0.1, 0.9), (0.1, 0.9), (1, 2))


# folders of other tools, archives and saved sets


def test_two_folders_of_simple_tuner(tmp_path):
    for side, content in (("win", A), ("lose", B)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "1.png").write_bytes(content)
        (tmp_path / side / "1.txt").write_text("a cat")
    assert told(read(tmp_path)) == [("a cat", (1, 0), (), (1, 2))]


def test_an_image_folder(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number, content in enumerate((A, B)):
            (tmp_path / split / f"{number}.png").write_bytes(content)
        row = {"chosen_file_name": "1.png", "rejected_file_name": "0.png", "prompt": split}
        write_jsonl(tmp_path / split / "metadata.jsonl", [row])
    assert told(read(tmp_path, split="test")) == [("test", (1, 0), (), (2, 1))]
    write_jsonl(tmp_path / "train" / "metadata.jsonl", [{"file_name": "0.png", "text": "a cat"}])
    assert told(read(tmp_path / "train", view="demonstrations")) == [("a cat", (1,), (), (1,))]


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("named", ["jpg_0", "jpg_0.jpg"])
def test_webdataset_shards(tmp_path, named):
    other = named.replace("0", "1", 1)
    label = json.dumps({"label_0": 0, "label_1": 1}).encode()
    tar(
        tmp_path / "00000.tar",
        {f"0.{named}": A, f"0.{other}": B, "0.original_prompt.txt": b"a cat", "0.json": label},
    )
    tar(tmp_path / "00001.tar", {
        "1.json": label, f"1.{named}": B, f"1.{other}": A, 
        "1.original_prompt.txt": "un \u00e9l\u00e9phant".encode(),
    })  # fmt: skip
    expected = [("a cat", (0, 1), (), (1, 2)), ("un \u00e9l\u00e9phant", (0, 1), (), (2, 1))]
    assert told(read(tmp_path)) == expected
    assert told(read(tmp_path / "00001.tar")) == expected[1:]


def test_a_damaged_shard_is_named(tmp_path):
    whole = tar(
        tmp_path / "s.tar", {"0.jpg_0": A, "0.jpg_1": B, "0.txt": b"a cat", "0.json": b'{"label_0": 1}'}
    )
    (tmp_path / "s.tar").write_bytes(whole.read_bytes()[:700])
    with pytest.raises(UserError, match=r"s\.tar: not a whole tar file"):
        list(read(tmp_path / "s.tar"))


def test_a_saved_dataset(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{**PICK, "label_0": 1.0, "label_1": 0.0}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "many")
    expected = [("a cat", (1, 0), (), (1, 2))]
    assert told(read(tmp_path / "one")) == expected == told(read(tmp_path / "many", split="test"))
    with pytest.raises(UserError, match=r"data\.split is 'train'; .* has test"):
        read(tmp_path / "many")
