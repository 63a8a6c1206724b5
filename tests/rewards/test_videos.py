"""Video rewards: evenly spaced frames, their mean, and the choice of video or image rewards."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.media.frames import evenly_spaced, frame_image
from diffalign.media.videos import Video, read_video, write_video
from diffalign.rewards import registry
from diffalign.rewards import videos as of_videos
from diffalign.rewards.registry import Place, load
from diffalign.rewards.scoring.cache import ScoreCache
from diffalign.rewards.scoring.items import Item, read_items
from diffalign.rewards.scoring.score import Scorer, score
from diffalign.rewards.videos import FRAMES, MeanOverFrames, VideoReward, takes_videos
from diffalign.rewards.zoo.jpeg import compressibility
from tests.rewards.conftest import write_jsonl


def grey(*levels):
    """Return a video whose frames are plain."""
    frames = torch.tensor(levels, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return Video(frames.expand(-1, 3, 4, 6).contiguous(), 8.0)


def brightness(images, prompts):
    """Mean grey level plus the prompt's length."""
    assert len(images) == len(prompts) and all(isinstance(image, Image.Image) for image in images)
    return torch.tensor([np.asarray(i).mean() + len(p) for i, p in zip(images, prompts, strict=True)])


def length(videos, prompts):
    """Seconds."""
    return torch.tensor([len(video.frames) / video.fps for video in videos], dtype=torch.float64)


def moving(source, place):
    return length


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [
        (8, 1, [4]),
        (9, 3, [1, 4, 7]),
        (8, 8, list(range(8))),
        (3, 8, [0, 1, 2]),
        (81, 4, [10, 30, 50, 70]),
        (1, 1, [0]),
    ],
)
def test_frames_are_the_middles_of_equal_parts(count, wanted, expected):
    assert evenly_spaced(count, wanted) == expected
    mirrored = [count - 1 - i for i in expected][::-1]
    assert all(abs(a - b) <= 1 for a, b in zip(mirrored, expected, strict=True))  # no drift to either end


@pytest.mark.parametrize(("count", "wanted"), [(0, 1), (1, 0)])
def test_no_frames_are_no_choice(count, wanted):
    with pytest.raises(ValueError, match="at least one"):
        evenly_spaced(count, wanted)


def test_a_reward_of_images_is_the_mean_over_frames():
    reward = takes_videos(brightness, frames=2)
    videos = [grey(0, 10, 20, 30), grey(7)]  # frames 1 and 3 of four; the only one
    assert reward(videos, ["ab", "abc"]).tolist() == [20 + 2, 7 + 3]
    assert takes_videos(reward) is reward
    assert reward([], []).shape == (0,)


def test_a_frame_keeps_its_pixels():
    frames = torch.randint(0, 256, (3, 3, 4, 6), dtype=torch.uint8, generator=torch.manual_seed(0))
    image = frame_image(Video(frames, 8.0), 1)
    assert image.size == (6, 4)
    assert np.array_equal(np.asarray(image), frames[1].permute(1, 2, 0).numpy())


def test_a_reward_of_videos_watches_them_and_refuses_images(monkeypatch):
    card = dataclasses.replace(
        registry.REGISTRY["jpeg"], name="seconds", video=True, target=f"{__name__}:moving"
    )
    monkeypatch.setitem(registry.REGISTRY, "seconds", card)
    reward = load("seconds")
    assert isinstance(reward, VideoReward) and takes_videos(reward) is reward
    scores = reward([grey(1, 2, 3, 4), grey(1)], ["a", "b"])
    assert scores.dtype == torch.float32 and scores.tolist() == [0.5, 0.125]
    for images in ([Image.new("RGB", (4, 4))], torch.zeros(1, 3, 4, 4)):
        with pytest.raises(UserError, match="'seconds' judges videos, and these are images"):
            reward(images, ["a"])


def test_a_reward_of_images_refuses_videos():
    with pytest.raises(ValueError, match="this is a reward of images"):
        compressibility(None, Place())([grey(1)], ["a"])


def scored(items, reward, **options):
    return score(items, [Scorer("light", reward, "key")], progress=False, **options)


def levels(rows):
    return [round(row["light"]) for row in rows]


def test_folders_and_lists_of_videos_are_scored(tmp_path):
    for level in (10, 50):
        write_video(grey(level, level), tmp_path / f"{level}.mp4")
        (tmp_path / f"{level}.txt").write_text("abc")
    assert levels(scored(read_items(tmp_path), brightness).rows) == [13, 53]
    assert scored(read_items(tmp_path), VideoReward("seconds", length)).rows[0]["light"] == 0.25
    rows = [{"prompt": "a", "video": "10.mp4"}, {"prompt": "ab", "video": "50.mp4"}]
    assert levels(scored(read_items(write_jsonl(tmp_path / "one.jsonl", rows)), brightness).rows) == [11, 52]
    row = {"prompt": "a", "videos": ["50.mp4", "10.mp4"], "segments": [[1.0], [0.0]]}
    (both,) = scored(read_items(write_jsonl(tmp_path / "two.jsonl", [row])), brightness).rows
    assert (round(both["light_0"]), round(both["light_1"])) == (51, 11)
    row = {"prompt": "a", "videos": "50.mp4"}
    with pytest.raises(UserError, match="line 1 has no path in the field 'videos'"):
        list(read_items(write_jsonl(tmp_path / "bad.jsonl", [row])))


def test_scores_of_videos_are_kept(tmp_path):
    write_video(grey(10), tmp_path / "a.mp4")
    item, asked = Item("a", (tmp_path / "a.mp4").read_bytes(), ()), []

    def counted(images, prompts):
        asked.append(len(images))
        return brightness(images, prompts)

    cache = ScoreCache(tmp_path / "scores.sqlite")
    assert item.is_video
    for _ in range(2):
        assert levels(scored([item], counted, cache=cache).rows) == [11]
    assert asked == [1]


def test_broken_videos_are_named_and_kinds_kept_apart(tmp_path):
    write_video(grey(10, 20), tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:200])
    found = scored(read_items(tmp_path, ["x"]), brightness)
    assert len(found.rows) == 1 and len(found.unreadable) == 1 and "b.mp4" in found.unreadable[0]
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"c.png: images and videos are scored apart"):
        scored(read_items(tmp_path, ["x"]), brightness)


def test_an_animation_is_a_video_among_videos(tmp_path):
    write_video(grey(10, 20), tmp_path / "a.mp4")
    film = [Image.new("RGB", (16, 16), (level,) * 3) for level in (20, 40)]
    film[0].save(tmp_path / "b.gif", save_all=True, append_images=film[1:], duration=100)
    count = VideoReward("frames", lambda videos, prompts: torch.tensor([len(v.frames) for v in videos]))
    assert levels(scored(read_items(tmp_path, ["x"]), count).rows) == [2, 2]
    assert levels(scored(read_items(tmp_path, ["x"]), brightness).rows) == [16, 31]
    rows = [{"prompt": "x", "videos": ["b.gif"]}, {"prompt": "x", "chosen": "b.gif", "rejected": "a.mp4"}]
    assert all(item.is_video for item in read_items(write_jsonl(tmp_path / "v.jsonl", rows)))
    rows = [{"prompt": "x", "image": "b.gif"}]
    assert not any(item.is_video for item in read_items(write_jsonl(tmp_path / "i.jsonl", rows)))


def test_rewards_of_images_are_given_no_more_frames_than_they_see(tmp_path, monkeypatch):
    levels_of = [10 * i for i in range(20)]
    write_video(grey(*levels_of), tmp_path / "a.mp4")
    item = Item("a", tmp_path / "a.mp4", ())
    expected = MeanOverFrames(brightness)([read_video(item.image)], ["a"]).item()
    kept = []
    monkeypatch.setattr(
        of_videos, "frame_image", lambda video, i: kept.append(len(video.frames)) or frame_image(video, i)
    )
    assert scored([item], brightness).rows[0]["light"] == expected
    assert kept == [FRAMES] * FRAMES
