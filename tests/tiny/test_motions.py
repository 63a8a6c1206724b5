"""Moving shapes: captions, renders, and judges that detect each kind of defect."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign import rewards, tiny
from diffalign.data.prompts.prompt_sets import read_prompts
from diffalign.errors import UserError
from diffalign.media.videos import Video
from diffalign.tiny import motion_judge, motions
from diffalign.tiny.motions import FPS, FRAMES, SPEEDS, Clip, Defect, Mover
from diffalign.tiny_build import motion_corpus

TWO = "a red circle moves left quickly and a blue square moves right"


def clips(count, seed=0):
    rng = np.random.default_rng(seed)
    return [motions.clip_of(text, rng) for text in motions.split_captions("train")[:count]]


def test_captions_read_back_and_splits_are_disjoint():
    every = list(motions.captions())
    assert len(every) == len(set(every)) == 216 + 19440
    assert all(motions.compose(motions.parse(text)) == text for text in every[::37])
    parts = {split: set(motions.split_captions(split)) for split in motions.SPLITS}
    assert sum(map(len, parts.values())) == len(every)
    assert not parts["train"] & parts["test"] and not parts["test"] & parts["validation"]
    assert min(map(len, parts.values())) > 1500


@pytest.mark.parametrize(
    "text",
    [
        "a dog moves left",
        "a red circle moves left and a red square moves right",  # one colour twice
        "a red circle moves left and a blue square moves up",  # two axes
        "a red circle moves sideways",
        "a red circle",
    ],
)
def test_what_is_no_caption_is_named(text):
    with pytest.raises(ValueError, match="is not a caption of moving shapes"):
        motions.parse(text)


def test_things_keep_to_their_half_and_inside_the_picture():
    for clip in clips(200):
        where = motions.places(clip)
        assert where.shape == (len(clip.movers), FRAMES, 3)
        assert where[..., :2].min() > 4 and where[..., :2].max() < 28
        if len(clip.movers) == 2:
            across = 1 - motions.axis(clip.movers[0])
            sides = where[:, :, across] < 16
            assert (sides[0] != sides[1]).all()


def test_things_move_as_told():
    clip = Clip(motions.parse(TWO), (0.5,) * 9)
    where = motions.places(clip)
    seconds = (FRAMES - 1) / FPS
    assert np.allclose((where[0, 0, 0] - where[0, -1, 0]) / seconds, np.mean(SPEEDS["quickly"]))
    assert np.allclose((where[1, -1, 0] - where[1, 0, 0]) / seconds, np.mean(SPEEDS[""]))
    assert np.allclose(np.diff(where[..., 1]), 0)


def test_judges_hold_true_clips_for_true():
    for clip in clips(15):
        frames, text = motions.render(clip), motions.caption(clip)
        assert motion_judge.content(frames, text) == 1
        assert motion_judge.motion(frames, text) == 1
        speeds = [motions.speed_of(clip, i) for i in range(len(clip.movers))]
        assert motion_judge.dynamics(frames, text) == pytest.approx(np.mean(speeds), abs=0.1)


@pytest.mark.parametrize("kind", motions.DEFECTS)
def test_each_defect_costs_what_it_is_about(kind):
    for clip in clips(8, seed=1):
        text = motions.caption(clip)
        frames = motions.render(replace(clip, defects=(Defect(kind, 0, 4),)))
        content, motion = motion_judge.content(frames, text), motion_judge.motion(frames, text)
        if kind == "stutter":
            assert content == 1 and motion < 0.95
        else:
            statements = 1 + 2 * len(clip.movers)
            assert content == pytest.approx(1 - (8 / FRAMES + 1) / 2 / statements)
            assert motion > 0.97


def test_wrong_words_cost_and_nonsense_has_nothing():
    clip = Clip(motions.parse(TWO), (0.5,) * 9)
    frames = motions.render(clip)
    assert motion_judge.content(frames, TWO.replace("red", "green")) == pytest.approx(0.8)
    assert motion_judge.content(frames, TWO.replace("circle", "triangle")) == pytest.approx(0.8)
    assert motion_judge.content(frames, "a red circle moves left quickly") == pytest.approx(2 / 3)
    assert motion_judge.motion(frames, TWO.replace("left", "right")) == pytest.approx(0.5)
    assert motion_judge.motion(frames, TWO.replace("quickly", "slowly")) == pytest.approx(5 / 6, abs=0.01)
    noise = np.random.default_rng(0).integers(0, 256, frames.shape, dtype=np.uint8)
    blank = np.full_like(frames, 200)
    for nothing in (noise, blank):
        assert motion_judge.content(nothing, TWO) == motion_judge.motion(nothing, TWO) == 0
        assert motion_judge.dynamics(nothing, TWO) == 0


def test_frozen_clips_have_no_motion_and_half_the_frames_half_the_speed():
    clip = Clip((Mover("red", "circle", "left", "quickly"),), (0.5,) * 9)
    frames, text = motions.render(clip), motions.caption(clip)
    still = np.repeat(frames[:1], FRAMES, axis=0)
    assert motion_judge.content(still, text) == 1 and motion_judge.motion(still, text) == 0
    assert motion_judge.dynamics(frames, text, FPS / 2) == pytest.approx(
        motions.speed_of(clip, 0) / 2, abs=0.1
    )


def test_faster_things_have_more_defects_in_the_corpus():
    rng = np.random.default_rng(3)
    drawn = [motions.corpus_clip("a red circle moves left", rng) for _ in range(600)]
    bad = np.array([bool(clip.defects) for clip in drawn])
    fast = np.array([motions.speed_of(clip, 0) > 6 for clip in drawn])
    assert 0.4 < bad.mean() < 0.6
    assert bad[fast].mean() > bad[~fast].mean() + 0.25


def test_the_corpus_keeps_to_the_train_split_and_is_partly_wrong():
    corpus = motion_corpus.make(150, seed=2)
    assert corpus.frames.shape == (150, FRAMES, 32, 32, 3) and corpus.frames.dtype == np.uint8
    assert {motions.split_of(text) for text in corpus.captions} == {"train"}
    wrong = np.mean([a != b for a, b in zip(corpus.captions, corpus.truths, strict=True)])
    assert 0.3 < wrong < 0.7
    assert (
        motion_corpus.make(5, seed=2, clean=True).captions == motion_corpus.make(5, seed=2, clean=True).truths
    )


def test_clips_are_videos_of_the_splits_captions():
    drawn = list(motions.clips("validation", 3))
    assert [text for text, _ in drawn] == tiny.motion_prompts("validation", 3)
    assert read_prompts("tiny:motions/validation", 3) == tiny.motion_prompts("validation", 3)
    for text, video in drawn:
        assert isinstance(video, Video) and video.frames.shape == (FRAMES, 3, 32, 32) and video.fps == FPS
        assert video.frames.dtype == torch.uint8
        assert motion_judge.content(video.frames.permute(0, 2, 3, 1).numpy(), text) == 1
    with pytest.raises(UserError, match="tiny:motions/train"):
        read_prompts("tiny:motions/all")


def test_the_judges_are_rewards_of_videos():
    texts, videos = zip(*motions.clips("train", 2), strict=True)
    for name in ("video_content", "video_motion"):
        reward = rewards.load(name)
        assert reward(list(videos), list(texts)).tolist() == [1.0, 1.0]
    assert rewards.load("video_dynamics")(list(videos), list(texts)).min() > 1
    with pytest.raises(UserError, match="only knows captions of moving shapes"):
        rewards.load("video_content")([videos[0]], ["a dog"])
