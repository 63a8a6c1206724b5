"""Video files: frames by presentation time, whole or not at all."""

import csv
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.media.videos import Probe, Video, probe, read_video, write_video
from tests.helpers import PUBLISHED_DATA

av = pytest.importorskip("av")
VIDEOALIGN = PUBLISHED_DATA / "videoalign"


def levels(count, height=32, width=48):
    """Frame i is grey of level 8 i: it can be told after compression."""
    return (8 * torch.arange(count, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(-1, 3, height, width)


def seen(video):
    """Which of the frames of ``levels`` a video has."""
    return (video.frames.float().mean((1, 2, 3)) / 8).round().int().tolist()


def lossless(path, frames, times, rate=1000):
    """Write a file whose frames (F, H, W, 3) are exactly those given, shown at these milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for pixels, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = time, stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def noise(count, height=18, width=34):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_frames_are_decoded_bit_for_bit(tmp_path):
    frames = noise(9)
    path = lossless(tmp_path / "a.mkv", frames, range(0, 900, 100), 10)
    video = read_video(path)
    assert video.fps == pytest.approx(10, rel=1e-3)
    assert video.frames.dtype == torch.uint8
    assert np.array_equal(video.frames.permute(0, 2, 3, 1).numpy(), frames)
    assert torch.equal(read_video(path.read_bytes()).frames, video.frames)


def test_what_is_written_is_what_libav_decodes(tmp_path):
    write_video(Video(levels(12), 30000 / 1001), tmp_path / "new" / "a.mp4")
    with av.open(str(tmp_path / "new" / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt, stream.average_rate) == (
            "h264", "yuv420p", Fraction(30000, 1001),
        )  # fmt: skip
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    video = read_video(tmp_path / "new" / "a.mp4")
    assert np.array_equal(video.frames.permute(0, 2, 3, 1).numpy(), np.stack(plain))
    assert seen(video) == list(range(12)) and video.fps == pytest.approx(29.97, abs=1e-3)
    assert (video.frames.int() - levels(12).int()).abs().max() <= 1
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("fps", [5.0, 12.5, 16.0, 25.0, 24000 / 1001])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_another_rate_takes_the_nearest_frames_and_whole_ones_only(tmp_path, fps, start):
    write_video(Video(levels(25), 12.5), tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4") == Probe(25, 12.5, 32, 48)
    count = int((2.0 - start) * fps + 1e-6)
    shown = np.arange(25) / 12.5
    nearest = [int(np.abs(shown - (start + k / fps)).round(9).argmin()) for k in range(count)]
    video = read_video(tmp_path / "a.mp4", fps=fps, start=start)
    assert seen(video) == nearest and video.fps == fps
    assert probe(tmp_path / "a.mp4").length(fps, start) == count
    assert seen(read_video(tmp_path / "a.mp4", fps, 4, start)) == nearest[:4]


def test_a_varying_frame_rate_is_read_by_presentation_time(tmp_path):
    times = [0, 40, 500, 540, 1000, 1900]  # the last is shown as long as the mean
    path = lossless(tmp_path / "a.mkv", noise(6), times)
    nearest = [min(range(6), key=lambda i: (abs(times[i] - k * 100), i)) for k in range(18)]
    video = read_video(path, fps=10, frames=18)
    assert np.array_equal(video.frames.permute(0, 2, 3, 1).numpy(), noise(6)[nearest])


def test_odd_sides_get_their_edge_twice(tmp_path):
    write_video(Video(levels(3, 31, 47), 8), tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4") == Probe(3, 8, 32, 48)
    assert seen(read_video(tmp_path / "a.mp4")) == [0, 1, 2]


def test_a_turned_video_is_read_as_displayed(tmp_path):
    frames = torch.zeros(4, 3, 32, 48, dtype=torch.uint8)
    frames[..., :16, :16] = 255  # top left, as it is stored
    write_video(Video(frames, 8), tmp_path / "a.mp4")
    upright = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0"
    clockwise = bytes(4) + b"\0\1\0\0" + bytes(4) + b"\xff\xff\0\0" + bytes(4)
    content = (tmp_path / "a.mp4").read_bytes()
    track = content.index(b"tkhd")  # the movie's own matrix stays
    turned = content[:track] + content[track:].replace(upright, clockwise, 1)
    assert probe(turned) == Probe(4, 8, 48, 32)
    first = read_video(turned).frames[0].float()
    assert first.shape == (3, 48, 32)
    assert first[:, :16, 16:].mean() > 250 and first[:, :16, :16].mean() < 5 and first[:, 16:].mean() < 5


def test_an_animated_gif_is_a_video_on_white(tmp_path):
    pictures = []
    for i in range(4):
        picture = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
        picture.paste((0, 40 * i, 0, 255), (0, 0, 10, 10))
        pictures.append(picture)
    pictures[0].save(
        tmp_path / "a.gif",
        save_all=True,
        append_images=pictures[1:],
        duration=[100, 200, 100, 100],
        disposal=2,
    )
    video = read_video(tmp_path / "a.gif", fps=10)
    assert video.frames[:, 1, 5, 5].tolist() == [0, 40, 40, 80, 120]
    assert (video.frames[:, :, :, 15] == 255).all()


@pytest.mark.parametrize("cut", [10, 0.5, 0.9, -1])
@pytest.mark.parametrize("kind", ["mp4", "mkv", "gif"])
def test_a_truncated_file_is_named(tmp_path, cut, kind):
    path = tmp_path / f"short.{kind}"
    if kind == "mp4":
        write_video(Video(levels(25), 12.5), path)
    elif kind == "mkv":
        lossless(path, noise(12), range(0, 1200, 100))
    else:
        pictures = [Image.fromarray(frame) for frame in noise(6)]
        pictures[0].save(path, save_all=True, append_images=pictures[1:])
    content = path.read_bytes()
    if kind == "mkv" and cut == -1:
        pytest.skip("the index at the end is no frame")
    path.write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    for read in (probe, read_video):
        with pytest.raises(UserError, match=rf"short\.{kind}"):
            read(path)


def test_what_is_no_video(tmp_path):
    (tmp_path / "a.mp4").write_text("hello")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    for name, why in (("a.mp4", "no whole video"), ("b.png", "a picture"), ("gone.mp4", "No such file")):
        with pytest.raises(UserError, match=rf"{name}.*{why}"):
            read_video(tmp_path / name)
    with pytest.raises(UserError, match="the video: a picture"):
        read_video((tmp_path / "b.png").read_bytes())
    write_video(Video(levels(4), 8), tmp_path / "c.mp4")
    with pytest.raises(UserError, match=r"c\.mp4 is 0\.50 s long; nothing to read from 0\.5 s on"):
        read_video(tmp_path / "c.mp4", start=0.5)


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    write_video(Video(levels(4), 8), tmp_path / "a.mp4")
    before = (tmp_path / "a.mp4").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffalign.utils.files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_video(Video(levels(9), 8), tmp_path / "a.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before
    with pytest.raises(UserError, match="no frames"):
        write_video(Video(levels(0), 8), tmp_path / "a.mp4")


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r'pip install "diffalign\[video\]"'):
        read_video(tmp_path / "a.mp4")


def test_real_videos_are_as_their_table_says():
    with (VIDEOALIGN / "example.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for side in "AB":
                found = probe(VIDEOALIGN / row[f"path_{side}"])
                assert found.fps == float(row[f"fps_{side}"])
                assert found.frames == float(row[f"num_frames_{side}"])
    path = Path(VIDEOALIGN / "example_3_B.mp4")  # 60 frames, 16 a second
    every = read_video(path)
    assert every.frames.shape == (60, 3, 48, 86) and every.fps == 16
    assert torch.equal(read_video(path, fps=8).frames, every.frames[::2])


def test_one_video_is_one_file_whatever_its_sides(tmp_path):
    frames = torch.randint(0, 256, (5, 3, 18, 34), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    written = set()
    for _ in range(25):
        write_video(Video(frames, 8.0), tmp_path / "a.mp4")
        written.add((tmp_path / "a.mp4").read_bytes())
    assert len(written) == 1


def test_messages_of_libav_are_off_when_videos_are_read(tmp_path):
    """With them on, as older torchvision turns them on, two videos read side by side hang."""
    write_video(Video(levels(9), 8.0), tmp_path / "v.mp4")
    av.logging.set_level(av.logging.ERROR)
    probe(tmp_path / "v.mp4")
    assert av.logging.get_level() is None
