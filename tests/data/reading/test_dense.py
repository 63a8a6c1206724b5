"""Labels in time: which segments a latent frame shows, what is tied, dropped, missing; mixed sets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.config.schema import DataConfig
from diffalign.data import PairSource, encode_preferences, fixed_batches, read_preferences, split_holdout
from diffalign.data.encoding.geometry import Cut
from diffalign.data.reading.dense import Dense, dense_of
from diffalign.data.reading.examples import turn_labels
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.evaluation.displacement import measure
from diffalign.losses.contrast import contrast
from diffalign.training.diagnostics import HeldOut
from tests.data.conftest import Family, VideoModel, film, write_jsonl
from tests.helpers import Answers, sd_path

pytest.importorskip("av")
CLIP = {"height": 16, "width": 16, "frames": 13, "fps": 8.0}
CUT = Cut((16, 16), (16, 16), (0, 0), (16, 16), 13, 8.0)
LABELS = [[1, 0, 0.5, 0], [0, 1, 0.5, 1]]


def of(segments, seconds=0.5, cut=CUT):
    model = VideoModel()
    rows = tuple(map(tuple, segments))
    return dense_of(rows, seconds, cut, model.latent_frames(cut.frames), model.frames_of)


@pytest.fixture
def videos(tmp_path):
    for i in range(8):
        film(tmp_path / f"{i}.mp4", i, 16)
    return tmp_path


def encode(folder, rows, **settings):
    rows = [
        {"prompt": f"p{i}", "videos": [f"{2 * i}.mp4", f"{2 * i + 1}.mp4"], **row}
        for i, row in enumerate(rows)
    ]
    config = DataConfig(path=str(write_jsonl(folder / "p.jsonl", rows)), **CLIP, **settings)
    return encode_preferences(VideoModel(), read_preferences(config), config, folder / "c", False)


def test_which_segments_a_latent_frame_shows():
    """8 frames a second, half a second each: frames 0-3, 4-7, 8-11, 12; latent frames 0, 1-4, 5-8, 9-12."""
    dense = of(LABELS)
    assert dense.shown == ((0,), (0, 0, 0, 1), (1, 1, 1, 2), (2, 2, 2, 3))
    assert dense.per_frame(0) == [1, 3 / 4, 1 / 8, 3 / 8]
    assert dense.per_frame(1) == [0, 1 / 4, 7 / 8, 5 / 8]
    assert (dense.tied, dense.missing, dense.beyond) == (1, 0, 0)


@pytest.mark.parametrize("fps", [8.0, 10.0, 24.0, 29.97])
@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0, 1 / 3])
def test_a_latent_frame_has_the_mean_of_its_frames(fps, seconds):
    cut = replace(CUT, frames=21, fps=fps)
    labels = np.random.default_rng(0).random((2, 300))
    dense = of(labels.tolist(), seconds, cut)
    frames = labels[:, [int(frame / fps / seconds + 1e-6) for frame in range(21)]]
    expected = np.concatenate([frames[:, :1], frames[:, 1:].reshape(2, 5, 4).mean(2)], axis=1)
    assert np.allclose([dense.per_frame(0), dense.per_frame(1)], expected, atol=1e-12)
    assert dense.beyond == 300 - len(dense.scores[0])


def test_beyond_the_end_is_left_out_and_what_is_missing_is_a_tie():
    short = of([row[:2] for row in LABELS])
    assert short.scores == ((1, 0, 0, 0), (0, 1, 0, 0)) and (short.missing, short.tied) == (2, 2)
    assert short.per_frame(0)[3] == short.per_frame(1)[3] == 0
    long = of([[*row, 1, 1] for row in LABELS])
    assert long.scores == of(LABELS).scores and long.beyond == 2
    gap = of([[1, float("nan"), 1, 1], [0, 1, 0, 0]])
    assert gap.scores == ((1, 0, 1, 1), (0, 0, 0, 0)) and (gap.missing, gap.tied) == (1, 1)


def test_batches_have_a_score_for_each_latent_frame(videos):
    rows = [
        {"segments": LABELS, "segment_seconds": 0.5},
        {"segments": [[1, 1], [1, 1]]},  # of a second, as the configuration says: a tie
        {"scores": [0, 1]},  # counts for all frames
        {"segments": [[1, None, 1], [0, 1, 0]], "scores": [5, 4]},
    ]
    encoded = encode(videos, rows, holdout=0.5)
    assert encoded.counts.text == (
        "3 pairs, 1 tie, 8 segments, 4 of them tied (1 for want of a label), 1 beyond the end left out, "
        "0 rows without label, 0 unreadable"
    )
    assert [record.scores for record in encoded] == [(0.375, 0.625), (1, 1), (0, 1), (5, 4)]
    (batch,) = fixed_batches(encoded, Family(), DataConfig(**CLIP), 4)
    assert batch.x.shape == (8, 3, 4, 2, 2) and batch.score.dtype == torch.float32
    assert batch.score.tolist() == [
        [1, 0.75, 0.125, 0.375], [0, 0.25, 0.875, 0.625], *[[1] * 4] * 2, [0] * 4, [1] * 4,
        [1, 1, 0.75, 0], [0] * 4,
    ]  # fmt: skip
    # a second is frames 0-7: latent frame 2 is frames 5-8, three of the first segment and one without a label
    assert encoded[3].dense.shown[2] == (0, 0, 0, 1)
    again = encode(videos, rows)
    assert list(again) == list(encoded) and again.counts == encoded.counts
    for part in split_holdout(encoded, 0.5, 4, 0):  # wherever the one without segments has landed
        assert part.dense and all(len(part.scores(record, 0)) == 4 for record in part)
    source = PairSource(encoded, Family(), DataConfig(**CLIP), 2)
    assert source.batch(0).score.shape == (4, 4)


def test_a_latent_frame_between_segments():
    assert of([[1, 0, 0, 0], [0, 0, 0, 0]]).per_frame(0) == [1, 0.75, 0, 0]


def test_labels_turned_round(videos):
    rows = [{"segments": [[1, None, 0.25, 0], [0, 1, 0.5, 1]], "segment_seconds": 0.5}]
    (example,) = read_preferences(DataConfig(path=str(write_rows(videos, rows)), **CLIP))
    turned = turn_labels(example)
    assert turned.segments[0][2:] == (0.5, 1) and turned.segments[1][2:] == (0.25, 0)
    assert str(turn_labels(turned).segments) == str(example.segments)
    plain, flipped = encode(videos, rows), encode(videos, rows, flip_labels=1.0)
    assert plain[0].dense.per_frame(0) == flipped[0].dense.per_frame(1)
    assert plain[0].dense.tied == flipped[0].dense.tied == 1


def write_rows(folder, rows):
    return write_jsonl(
        folder / "q.jsonl", [{"prompt": "p", "videos": ["0.mp4", "1.mp4"], **row} for row in rows]
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"segments": [[1, 0]]},
            r"q\.jsonl line 1: segments is \[\[1, 0\]\]; allowed: for each of the 2 videos",
        ),
        ({"segments": [[1, 0], [1]]}, "equally long"),
        ({"segments": [[], []]}, "a list of scores"),
        ({"segments": [["a"], ["b"]]}, "a list of scores"),
        (
            {"segments": [[1], [0]], "segment_seconds": 0},
            "segment_seconds is 0; allowed: a number of seconds",
        ),
        ({"segments": [[1], [0]], "segment_seconds": "1"}, "segment_seconds is '1'"),
    ],
)
def test_what_is_no_dense_label(videos, row, message):
    with pytest.raises(UserError, match=message):
        list(read_preferences(DataConfig(path=str(write_rows(videos, [row])), **CLIP)))


def test_rows_without_any_label_and_images_with_segments(videos):
    nothing = [{"segments": None}, {"segments": [[None], [None]]}, {"segments": [[1], [0]]}]
    preferences = read_preferences(DataConfig(path=str(write_rows(videos, nothing)), **CLIP))
    assert len(list(preferences)) == 1 and preferences.counts.unlabelled == 2
    images = write_jsonl(videos / "i.jsonl", [{"prompt": "p", "images": ["a", "b"], "segments": [[1], [0]]}])
    config = DataConfig(path=str(images))
    with pytest.raises(
        UserError, match=r"i\.jsonl line 1: segments are labels of videos; data.frames is null"
    ):
        encode_preferences(VideoModel(), read_preferences(config), config, videos / "c", False)


def test_views_of_dense_labels(videos):
    rows = [{"videos": ["0.mp4", "1.mp4", "2.mp4"], "segments": [[1, 0], [0, 1], [0, 1]]}]
    auto = encode(videos, rows)
    assert auto.counts.lists == 1 and auto.counts.tied == 0
    two = encode(videos, rows, view="pairs")  # the second and the third are equal all along
    assert [record.dense.scores for record in two] == [((1, 0), (0, 1))] * 2 and two.dense
    votes = encode(videos, rows, view="majority")
    assert votes[0].scores == (2, 1, 1) and not votes.dense and not votes.counts.segments
    pair = [{"segments": [[1, 0, 0], [0, 1, 0.5]], "segment_seconds": 0.5}, {"scores": [3, 1]}]
    majority = encode(videos, pair, view="majority")
    assert [record.scores for record in majority] == [(1, 2), (3, 1)]
    likes = encode(videos, rows, view="likes")
    assert (
        not likes.dense and [record.scores for record in likes] == [(1,)] * 3
    )  # all are the best on average


def test_a_group_in_part():
    dense = Dense(((1.0, 0.0), (0.0, 0.0), (1.0, 0.0)), ((0,), (1,)))
    assert dense.tied == 1 and dense.of((0, 2)).tied == 2 and dense.of((1,)) is None


@pytest.fixture
def batch(videos):
    rows = [{"segments": LABELS, "segment_seconds": 0.5}, {"segments": [[1, 0], [0, 1]]}]
    return next(fixed_batches(encode(videos, rows), Family(), DataConfig(**CLIP), 2))


def test_contrast_and_displacement_take_them(batch):
    c = contrast(torch.zeros_like(batch.score), batch.score, batch.group)
    # the second pair's latent frame 2 is frames 5-8, three of the first segment and one of the second
    assert c.weight.tolist() == [[1] * 4, [1] * 4] and c.better.tolist() == [[0, 0, 1, 1], [2, 2, 2, 3]]
    denoiser = Answers(torch.zeros_like(batch.x), sd_path())
    network = torch.nn.Conv3d(3, 3, 1)

    def asked(x_t, t, cond):
        network(x_t)
        return denoiser(x_t, t, cond)

    asked.path, asked.target = denoiser.path, denoiser.target
    (measured,) = measure(asked, network, [batch], Uniform(), 1)
    assert measured.groups.tolist() == [0, 1] and (measured.own > 0).all()
    held = HeldOut([batch])
    assert held.verdict == "not measured: no held-out data"
