"""Motion that is known: a square that goes v pixels a frame, and what only looks as if something moved."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffalign.evaluation.measuring.motion import DYNAMIC, MOTION, fastest, flow, motion_statistics, shrunk
from diffalign.media.videos import Video
from diffalign.tiny import motions

SIDE, FPS = 32, 8.0


def square(places, fps=FPS, scale=1):
    """Return frames of a square of 12 pixels whose upper left corner is at these (down, right)."""
    frames = torch.full((len(places), 3, SIDE, SIDE), 40, dtype=torch.uint8)
    for frame, (down, right) in zip(frames, places, strict=True):
        frame[:, down : down + 12, right : right + 12] = torch.tensor([200, 60, 90]).reshape(3, 1, 1)
    frames = frames.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return Video(frames, fps)


def going(velocity, count=5, **options):
    return square([(10, 2 + velocity * k) for k in range(count)], **options)


@pytest.mark.parametrize("velocity", [1, 2, 4])
def test_a_square_of_some_pixels_a_frame_is_that_fast(velocity):
    found = motion_statistics(going(velocity))
    assert found["dynamic_degree"] == pytest.approx(velocity * FPS / SIDE, rel=0.08)
    assert found["dynamic"] == float(velocity * FPS / SIDE > DYNAMIC) == 1.0
    assert found["motion_smoothness"] > 0.9
    assert tuple(found) == MOTION


def test_directions():
    down = motion_statistics(square([(2 + 2 * k, 10) for k in range(5)]))
    left = motion_statistics(square([(10, 18 - 2 * k) for k in range(5)]))
    for found in (down, left):
        assert found["dynamic_degree"] == pytest.approx(2 * FPS / SIDE, rel=0.08)
    shift = flow(*(video.frames[:1] / 255 for video in (square([(10, 10)]), square([(13, 8)])))).shift
    moved = shift[0][:, shift[0].norm(dim=0) > 0]
    assert moved.median(dim=1).values.tolist() == pytest.approx([3, -2], abs=0.1)


def test_speed_is_of_seconds_and_sides_whatever_the_rate_and_the_size():
    slow = motion_statistics(going(1, 9, fps=2 * FPS))  # every second frame is compared
    assert slow["dynamic_degree"] == pytest.approx(2 * FPS / SIDE, rel=0.08)
    large = motion_statistics(going(2, scale=4))  # 128 pixels, brought to 48
    assert large["dynamic_degree"] == pytest.approx(2 * FPS / SIDE, rel=0.1)
    assert shrunk(torch.zeros(1, 3, 480, 832)).shape == (1, 3, 48, 83)
    assert shrunk(torch.zeros(1, 3, 60, 40)).shape == (1, 3, 60, 40)


def test_half_a_pixel_of_a_soft_scene_is_half_a_pixel():
    scene = F.interpolate(torch.rand(1, 3, 6, 12, generator=torch.manual_seed(0)), (96, 192), mode="bicubic")
    frames = torch.cat([F.avg_pool2d(scene[..., 2 * k : 2 * k + 128], 4) for k in range(3)]).clamp(0, 1)
    moved = flow(frames[:-1], frames[1:])
    assert fastest(moved).tolist() == pytest.approx([0.5, 0.5], abs=0.12)


def test_shapes_that_move_by_parts_of_pixels_are_as_fast_as_they_were_drawn():
    random, drawn, measured = np.random.default_rng(0), [], []
    for caption in motions.split_captions("test")[:6]:
        clip = motions.clip_of(caption, random)
        drawn.append(max(motions.speed_of(clip, i) for i in range(len(clip.movers))))  # pixels a second
        measured.append(motion_statistics(motions.video(clip))["dynamic_degree"] * motions.SIDE)
    assert min(drawn) < 3 and max(drawn) > 8
    assert measured == pytest.approx(drawn, rel=0.3, abs=0.5)
    assert np.corrcoef(drawn, measured)[0, 1] > 0.97


def test_a_still_video_does_not_move():
    expected = {"dynamic_degree": 0, "dynamic": 0, "motion_smoothness": 1, "temporal_consistency": 1}
    assert motion_statistics(going(0)) == expected
    assert motion_statistics(going(3, 1)) == expected  # a single frame


def test_flicker_is_a_change_and_no_motion():
    frames = going(0, 6).frames.clone()
    frames[::2] += 51  # a fifth of the range, at every change
    found = motion_statistics(Video(frames, FPS))
    assert found["dynamic_degree"] == 0 and found["motion_smoothness"] == 1
    assert found["temporal_consistency"] == pytest.approx(0.8)
    moving = going(2, 5).frames.clone()
    moving[::2] += 51
    flickering = motion_statistics(Video(moving, FPS))["dynamic_degree"]
    assert flickering == pytest.approx(2 * FPS / SIDE, rel=0.08)


def test_noise_and_what_appears_are_no_motion():
    noise = torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.manual_seed(0))
    assert motion_statistics(Video(noise, FPS))["dynamic_degree"] < 0.05
    frames = torch.full((6, 3, SIDE, SIDE), 40, dtype=torch.uint8)
    frames[::2, :, 10:22, 10:22] = 220
    assert motion_statistics(Video(frames, FPS))["dynamic_degree"] < 0.01


def test_smoothness_tells_steady_from_jumping_motion():
    back_and_forth = square([(10, 8 + 4 * (k % 2)) for k in range(6)])
    assert motion_statistics(back_and_forth)["motion_smoothness"] < 0.05
    stutter = square([(10, 4 + 3 * (k // 2)) for k in range(8)])  # every frame twice
    assert motion_statistics(stutter)["motion_smoothness"] < 0.05
    uneven = square([(10, 2 + right) for right in (0, 2, 6, 8, 12)])  # 2, 4, 2, 4: |2 - 4| / (2 + 4)
    assert motion_statistics(uneven)["motion_smoothness"] == pytest.approx(2 / 3, abs=0.08)
