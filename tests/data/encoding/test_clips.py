"""Sets of videos: every format, one rate, length and size a group, latents cached."""

import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import diffalign.data.encoding.images as images_module
import diffalign.data.encoding.prepare as prepare_module
from diffalign.config.schema import DataConfig
from diffalign.data import PairSource, encode_preferences, fixed_batches, read_preferences
from diffalign.data.batches.order import lengths, scarce
from diffalign.data.encoding.geometry import Cut, clips
from diffalign.errors import UserError
from diffalign.media.videos import Probe, probe, read_video
from diffalign.runs.setup import check_frames
from tests.data.conftest import Family, VideoModel, film, png, write_jsonl, write_parquet
from tests.helpers import PUBLISHED_DATA

pytest.importorskip("av")
SMALL = {"height": 16, "width": 24, "frames": 13, "fps": 8.0, "cache_batch_size": 2}
CSV = PUBLISHED_DATA / "videoalign" / "example.csv"


def read(path, **settings):
    return read_preferences(DataConfig(path=str(path), **{**SMALL, **settings}))


def encode(path, cache, model, **settings):
    extra = {name: settings.pop(name) for name in ("rank", "world", "barrier") if name in settings}
    config = DataConfig(path=str(path), **{**SMALL, **settings})
    return encode_preferences(model, read_preferences(config), config, cache, False, **extra)


@pytest.fixture
def pairs(tmp_path):
    """Four pairs of eight videos: 24 frames at 8 a second, the last pair 24 and 15 frames at 12 and 10."""
    for i in range(6):
        film(tmp_path / f"{i}.mp4", i)
    film(tmp_path / "6.mp4", 6, 24, 12)
    film(tmp_path / "7.mp4", 7, 15, 10, width=64)
    return write_jsonl(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": f"p{i}", "videos": [f"{2 * i}.mp4", f"{2 * i + 1}.mp4"], "scores": [i % 2, 1 - i % 2]}
            for i in range(4)
        ],
    )


def pixels_of(path, cut):
    """Return the encoder's input, computed independently of the code: frame by frame with PIL."""
    found = []
    for frame in read_video(path, cut.fps, cut.frames).frames:
        image = Image.fromarray(frame.permute(1, 2, 0).numpy())
        image = image.resize(cut.resized[::-1], Image.Resampling.LANCZOS)
        top, left = cut.corner
        found.append(np.array(image)[top : top + cut.target[0], left : left + cut.target[1]])
    return torch.from_numpy(np.stack(found)).permute(3, 0, 1, 2).float() / 127.5 - 1


def test_what_is_stored_is_the_posterior_of_the_clip(pairs, tmp_path):
    model = VideoModel()
    encoded = encode(pairs, tmp_path / "c", model, flip=True)
    assert encoded.counts.text == "4 pairs, 0 ties, 0 rows without label, 0 unreadable"
    assert [record.scores for record in encoded] == [(0, 1), (1, 0)] * 2
    for record, first in ((encoded[0], 0), (encoded[3], 6)):
        for image, number in zip(record.images, (first, first + 1), strict=True):
            pixels = pixels_of(tmp_path / f"{number}.mp4", image.cut)[None]
            for flipped in (False, True):
                mean, std = model.encode_pixels(pixels.flip(-1) if flipped else pixels)
                kept_mean, kept_std = encoded.moments(image, flipped)
                assert torch.equal(kept_mean, mean[0]) and torch.equal(kept_std, std[0])
    # 15 frames at 10 a second are 1.5 s, 12 frames at 8 a second, of which a stride of four takes 9
    assert [record.bucket for record in encoded] == [(16, 24, 13)] * 3 + [(16, 24, 9)]
    assert encoded.moments(encoded[3].images[0])[0].shape == (3, 3, 2, 3)
    assert encoded[3].images[1].cut == Cut((32, 64), (16, 32), (0, 4), (16, 24), 9, 8.0)


def test_rate_length_and_size_of_a_group():
    videos = [Probe(126, 24, 752, 1360), Probe(152, 30, 720, 1280)]
    config = DataConfig(resolution=64, frames=81)
    usable = lambda frames: 1 + (frames - 1) // 4 * 4  # noqa: E731
    # as the first is filmed: 5.0667 s at 24 a second are 121 frames
    first, second = clips(videos, config, "x", usable)
    assert (
        (first.frames, first.fps, first.target)
        == (81, 24, (64, 64))
        == (second.frames, second.fps, second.target)
    )
    assert [cut.frames for cut in clips(videos, replace(config, frames=500), "x", usable)] == [121, 121]
    at_eight = clips(videos, replace(config, frames=500, fps=8), "x", usable)
    assert [(cut.frames, cut.seconds) for cut in at_eight] == [(37, 37 / 8)] * 2  # 5.0667 s hold 40
    assert clips(videos, config, "x", lambda frames: 0) is None


def test_a_single_frame_is_a_video_only_where_it_was_asked_for():
    videos, config = [Probe(24, 8, 32, 32), Probe(2, 8, 32, 32)], DataConfig(resolution=16, frames=13)
    usable = VideoModel().usable_frames
    assert usable(2) == 1 and clips(videos, config, "x", usable) is None
    assert [cut.frames for cut in clips(videos, replace(config, frames=1), "x", usable)] == [1, 1]


def test_lengths_are_told_and_those_too_rare_for_a_step(pairs, tmp_path):
    encoded = encode(pairs, tmp_path / "c", VideoModel())
    assert lengths(encoded.records) == "frames: 13 (3), 9 (1)"
    assert scarce(encoded.records, 1) == "" and scarce(encoded.records, 2) == "1 of 16 x 24 pixels, 9 frames"
    assert scarce(encoded.records, 4) == "1 of 16 x 24 pixels, 9 frames; 3 of 16 x 24 pixels, 13 frames"
    assert scarce(encoded.subset(range(3)).records, 8) == ""  # one size: it is all that there is


def test_batches_hold_one_length(pairs, tmp_path):
    encoded = encode(pairs, tmp_path / "c", VideoModel(), flip=True)
    config = DataConfig(**SMALL, flip=True)
    source = PairSource(encoded, Family(), config, 2, seed=3)
    shapes = {tuple(source.batch(step).x.shape) for step in range(12)}
    assert shapes == {(4, 3, 4, 2, 3), (4, 3, 3, 2, 3)}
    fixed = list(fixed_batches(encoded, Family(), config, 2))
    assert [tuple(batch.x.shape) for batch in fixed] == [
        (4 - 2 * (i != 1), 3, 3 + (i > 0), 2, 3) for i in (0, 1, 2)
    ]
    assert all(batch.score.shape == (len(batch.x),) for batch in fixed)


def test_a_second_run_encodes_nothing_and_other_clips_are_others(pairs, tmp_path):
    first = encode(pairs, tmp_path / "c", VideoModel())
    again = VideoModel()
    second = encode(pairs, tmp_path / "c", again)
    assert again.images == 0 and list(second) == list(first) and second.counts == first.counts
    keys = {image.key for record in first for image in record.images}
    for changed in ({"frames": 9}, {"fps": 4.0}, {"width": 16}):
        model = VideoModel()
        other = encode(pairs, tmp_path / "c", model, **changed)
        left = {image.key for record in other for image in record.images} - keys
        assert model.images == len(left) >= 6  # a clip of 9 frames at 8 a second is known already


def test_an_interrupted_run_goes_on(pairs, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode(pairs, tmp_path / "c", VideoModel(fails_after=2))
    model = VideoModel()
    encoded = encode(pairs, tmp_path / "c", model)
    assert model.images == 4 and list(encoded) == list(encode(pairs, tmp_path / "d", VideoModel()))


def test_two_processes_give_the_same_set(pairs, tmp_path):
    barrier, results = threading.Barrier(2), {}

    def work(rank):
        results[rank] = encode(
            pairs, tmp_path / "c", VideoModel(), rank=rank, world=2, barrier=barrier.wait, workers=rank
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = encode(pairs, tmp_path / "d", VideoModel())
    for rank in range(2):
        assert list(results[rank]) == list(alone) and results[rank].counts == alone.counts
        for record in alone:
            for image in record.images:
                assert torch.equal(results[rank].moments(image)[0], alone.moments(image)[0])


@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (2, 0), (3, 2)])
def test_no_more_videos_are_held_decoded_than_a_batch(pairs, tmp_path, monkeypatch, batch, workers):
    alive, most = weakref.WeakSet(), []

    def counted(content, cut):
        most.append(len(alive) + 1)
        pixels = images_module.cut_clip(content, cut)
        alive.add(pixels)
        return pixels

    monkeypatch.setattr(prepare_module, "cut_clip", counted)
    encode(pairs, tmp_path / "c", VideoModel(), cache_batch_size=batch, workers=workers)
    assert len(most) == 8 and max(most) == batch


def test_broken_videos_are_skipped_and_named(pairs, tmp_path, capsys):
    (tmp_path / "1.mp4").write_bytes((tmp_path / "1.mp4").read_bytes()[:-40])
    content = bytearray((tmp_path / "3.mp4").read_bytes())
    start = content.index(b"mdat") + 4
    content[start + 800 :] = bytes(len(content) - start - 800)  # packets are there, pictures are not
    (tmp_path / "3.mp4").write_bytes(content)
    encoded = encode(pairs, tmp_path / "c", VideoModel(fewest=13))
    assert [record.prompt for record in encoded] == ["p2"]
    first, second, short = encoded.counts.skipped
    assert first.startswith("pairs.jsonl line 1: 1.mp4 is unreadable (the video: the video ends early, after")
    assert second.startswith(
        "pairs.jsonl line 2: 3.mp4 is unreadable (the video: no whole video (Invalid data"
    )
    assert short == "pairs.jsonl line 4: video 1 is too short for the model, 1.50 s"
    assert "skipped pairs.jsonl line 4" in capsys.readouterr().err


def test_tables_of_videos(tmp_path):
    for i in range(3):
        film(tmp_path / f"{i}.mp4", i, 5)
    rows = [
        {"prompt": "list", "videos": ["0.mp4", "1.mp4", "2.mp4"], "scores": [1, 3, 2]},
        {"prompt": "pair", "video_0": "0.mp4", "video_1": "1.mp4", "label_0": 0, "label_1": 1},
        {"caption": "tie", "video_0": "0.mp4", "video_1": "1.mp4", "label_0": 0.5, "label_1": 0.5},
        {"caption": "none", "video_0": "0.mp4", "video_1": "1.mp4", "label_0": None, "label_1": None},
        {"prompt": "like", "video": "2.mp4", "liked": True},
        {"prompt": "trl", "chosen": "2.mp4", "rejected": "0.mp4"},
    ]
    preferences = read(write_jsonl(tmp_path / "p.jsonl", rows))
    examples = list(preferences)
    assert [(e.prompt, e.scores) for e in examples] == [
        ("list", (1, 3, 2)), ("pair", (0, 1)), ("tie", (0.5, 0.5)), ("like", (1,)), ("trl", (1, 0)),
    ]  # fmt: skip
    assert examples[0].images[2].source == tmp_path / "2.mp4"
    assert preferences.counts.unlabelled == 1
    content = [(tmp_path / f"{i}.mp4").read_bytes() for i in range(2)]
    table = [{"caption": "a", "video_0": content[0], "video_1": content[1], "label_0": 1.0, "label_1": 0.0}]
    path = write_parquet(tmp_path / "p.parquet", table)
    (example,) = read(path)
    assert [image.read() for image in example.images] == content and example.scores == (1, 0)
    with pytest.raises(UserError, match=r"column 'video_0' holds videos; data.frames is null"):
        read(path, frames=None, fps=None)


def test_folders_of_videos(tmp_path):
    for side in ("w", "l"):
        film(tmp_path / "pairs" / side / "a.mp4", len(side), 5)
    (tmp_path / "pairs" / "a.txt").write_text("a caption")
    (example,) = read(tmp_path / "pairs")
    assert (example.prompt, example.scores) == ("a caption", (1, 0))
    assert [image.source.parent.name for image in example.images] == ["w", "l"]
    film(tmp_path / "likes" / "disliked" / "b.webm.mp4", 1, 5)
    (tmp_path / "likes" / "disliked" / "b.webm.txt").write_text("b")
    assert [(e.prompt, e.scores) for e in read(tmp_path / "likes")] == [("b", (0,))]
    for name in ("pairs", "likes"):
        with pytest.raises(UserError, match=r"no images in .*\(videos need data.frames\)"):
            read(tmp_path / name, frames=None, fps=None)
    (tmp_path / "stills" / "w").mkdir(parents=True)
    (tmp_path / "stills" / "w" / "a.png").write_bytes(png(0))
    with pytest.raises(UserError, match="no videos in w/ and l/"):
        read(tmp_path / "stills")


def test_lists_and_likes_of_videos_are_served(pairs, tmp_path):
    rows = [{"prompt": "x", "videos": ["0.mp4", "1.mp4", "2.mp4"], "scores": [1, 3, 2]}]
    path = write_jsonl(tmp_path / "l.jsonl", rows)
    encoded = encode(path, tmp_path / "c", VideoModel())
    assert encoded.counts.lists == 1
    (batch,) = fixed_batches(encoded, Family(), DataConfig(**SMALL), 1)
    assert batch.score.tolist() == [1, 3, 2] and batch.x.shape == (3, 3, 4, 2, 3)
    seen = encode(path, tmp_path / "c", VideoModel(), view="pairs")
    assert [record.scores for record in seen] == [(1, 3), (1, 2), (3, 2)]
    likes = encode(pairs, tmp_path / "c", VideoModel(), view="likes")
    assert likes.counts.text.startswith("4 liked and 4 disliked")


def test_a_csv_of_real_pairs():
    scores = {label: [e.scores for e in read(CSV, label=label)] for label in ("VQ", "MQ", "TA")}
    assert scores == {
        "VQ": [(0, 1), (1, 0)], "MQ": [(0, 1), (0.5, 0.5)], "TA": [(1, 0), (0.5, 0.5)],
    }  # fmt: skip
    example = next(iter(read(CSV, label="VQ")))
    assert example.prompt.startswith("The camera remains still") and example.where == "example.csv row 0"
    assert [image.source.name for image in example.images] == ["example_1_A.mp4", "example_1_B.mp4"]
    with pytest.raises(UserError, match=r"several labels; set data.label to one of VQ, MQ, TA"):
        read(CSV)
    with pytest.raises(UserError, match=r"unknown label .data.label. 'Overall'.*allowed: MQ, TA, VQ"):
        read(CSV, label="Overall")


def test_csv_labels(tmp_path):
    file = tmp_path / "p.csv"
    head = "path_A,path_B,prompt,VQ,Overall\n"
    file.write_text(f'{head}a.mp4,b.mp4,"x, y",A,same\na.mp4,b.mp4,z,B,\na.mp4,b.mp4,q,B,B\n')
    preferences = read(file)
    assert [(e.prompt, e.scores, e.where) for e in preferences] == [
        ("x, y", (0.5, 0.5), "p.csv row 0"), ("q", (0, 1), "p.csv row 2"),
    ]  # fmt: skip
    assert preferences.counts.unlabelled == 1 and len(list(read(file, limit=1))) == 1
    file.write_text(f"{head}a.mp4,b.mp4,x,A,C\n")
    with pytest.raises(UserError, match=r"p\.csv row 0: Overall is 'C'; allowed: A, B, same"):
        list(read(file))
    file.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no preference columns; found a, b; needed"):
        read(file)
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x", "chosen": "a.mp4", "rejected": "b.mp4"}])
    with pytest.raises(UserError, match=r"data\.label is 'VQ', but the schema .* has one label only"):
        read(pairs, label="VQ")


def test_real_pairs_of_unequal_length_and_rate():
    def cut(**settings):
        config = DataConfig(path=str(CSV), label="VQ", **{**SMALL, "frames": 81, **settings})
        for example in read_preferences(config):
            probes = [probe(image.read()) for image in example.images]
            yield [(c.frames, c.fps) for c in clips(probes, config, "x", VideoModel().usable_frames)]

    assert list(cut(fps=None)) == [[(81, 24.0)] * 2, [(81, 24.0)] * 2]
    # the shorter of the first pair is 152 / 30 s, 40.5 frames at 8 a second, that of the second 60 / 16 s, 30
    assert list(cut()) == [[(37, 8.0)] * 2, [(29, 8.0)] * 2]


def test_a_mask_of_videos_is_one_picture_for_all_frames(tmp_path, pairs):
    row = {"prompt": "x", "videos": ["0.mp4", "1.mp4"], "scores": [1, 0]}
    (tmp_path / "m.png").write_bytes(png(0))
    path = write_jsonl(tmp_path / "m.jsonl", [{**row, "mask": "m.png"}, row])
    encoded = encode(path, tmp_path / "c", VideoModel())
    batch = next(fixed_batches(encoded, Family(), DataConfig(), 2))
    maps = batch.extra["patches"]
    assert maps.shape == (4, 1, *batch.x.shape[2:]) and maps.shape[2] > 1
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0, :, :1].expand_as(maps[0]), maps[0])
    assert (maps[2:] == 1).all() and maps[0].min() < 1


def test_what_does_not_go_together(tmp_path, pairs):
    for settings, message in (
        ({"height": None}, "data.height is null, but its fellow is 24"),
        ({"buckets": True}, "data.height is 16 with data.buckets"),
        ({"frames": None}, "data.fps is 8.0; allowed: null without data.frames"),
        ({"frames": 0}, "data.frames is 0; allowed: at least 1"),
        ({"fps": 0.0}, "data.fps is 0.0; allowed: more than 0"),
        ({"width": 12}, "data.width is 12; allowed: a multiple of 8"),
        ({"segment_seconds": 0.0}, "data.segment_seconds is 0.0; allowed: more than 0"),
    ):
        with pytest.raises(UserError, match=message):
            read(pairs, **settings)


def test_a_model_and_its_kind_of_data():
    def model(video):
        def shape(height, width, frames):
            if frames % 4 != 1:
                raise UserError("no such number")

        return SimpleNamespace(
            codec=SimpleNamespace(video=video),
            family=SimpleNamespace(name="fam"),
            usable_frames=VideoModel().usable_frames,
            latent_shape=shape,
        )

    with pytest.raises(UserError, match=r"data.frames=13, but fam is a model of images; allowed: null"):
        check_frames(DataConfig(**SMALL), model(False))
    with pytest.raises(
        UserError, match=r"data.frames is null, but fam is a model of videos; allowed: such as 17"
    ):
        check_frames(DataConfig(), model(True))
    with pytest.raises(UserError, match="no such number"):
        check_frames(DataConfig(frames=12), model(True))
    check_frames(DataConfig(**SMALL), model(True))
    check_frames(DataConfig(), model(False))
