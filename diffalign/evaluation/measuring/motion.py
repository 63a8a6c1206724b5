"""Amount and steadiness of motion in a video, and similarity of consecutive frames, without a network.

Dynamic degree in the sense of VBench (Huang et al., arXiv 2311.17982): of every two frames an eighth of a
second apart, how fast the fastest 5 % of the pixels move; a video is dynamic if at least a quarter of its
frames are followed by more than 6 pixels of a frame of 256, 0.1875 of the short side a second (VBench's
``dynamic_degree.py``). VBench's flow is RAFT's, a network. Here it is that of blocks matched on frames of 48
lines, so **the figures are not VBench's**: compare them with each other only. Speeds above a quarter of the
short side in an eighth of a second are not followed.

A block is 9 x 9 pixels of three colours minus its mean, so that a change of light is no motion. It counts as
moved if a displacement explains at least half of its change, so that noise, flicker and appearing or
vanishing objects are no motion either. The motion of flat blocks, and of blocks without a match in both
directions, is unknown. The others take the median of the motion around them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from diffalign.media.videos import Video

LINES = 48  # of the short side of frames that are matched
BLOCK = 9
REACH = 0.25  # of the short side: the range of the search for a block
RATE = 8.0  # frames a second that are compared
FASTEST = 0.05  # share of the pixels
DYNAMIC = 6 * RATE / 256  # short sides a second
DYNAMIC_SHARE = 0.25  # of the frames
NOISE = (2 / 255) ** 2  # mean square of a block's pixels below which it is flat
_AT_ONCE = 20_000_000  # costs in memory

MOTION = ("dynamic_degree", "dynamic", "motion_smoothness", "temporal_consistency")


@dataclass(frozen=True)
class Flow:
    """The displacement of the pixels of N frames to N other frames.

    Attributes:
        shift: (N, 2, h, w), down and to the right, in pixels; 0 where nothing moves or nothing is known.
        known: (N, h, w), whether a block is not flat and was matched in both directions.
    """

    shift: Float[Tensor, "N 2 h w"]
    known: Bool[Tensor, "N h w"]


def motion_statistics(video: Video) -> dict[str, float]:
    """Return the statistics of one video.

    dynamic_degree: short sides a second of the fastest 5 % of the pixels, the mean over time. dynamic: 1 if
    the video counts as dynamic, else 0. motion_smoothness: 1 - |second differences| of the paths that blocks
    take over the sum of their first differences: 1 where everything moves steadily or not at all, 0 where
    motion turns back, or stops, at every frame. temporal_consistency: 1 - the mean absolute change from frame
    to frame, pixels in [0, 1].
    """
    frames = video.frames.float() / 255
    consistency = 1.0 - float((frames[1:] - frames[:-1]).abs().mean()) if len(frames) > 1 else 1.0
    step = max(1, round(video.fps / RATE))
    small = shrunk(frames[::step])
    speeds, smoothness = torch.zeros(0), 1.0
    if len(small) > 1:
        moved = flow(small[:-1], small[1:])
        speeds = fastest(moved) * video.fps / (step * min(small.shape[-2:]))
        smoothness = steadiness(moved)
    enough = max(1, round(DYNAMIC_SHARE * len(small)))
    return {
        "dynamic_degree": float(speeds.mean()) if len(speeds) else 0.0,
        "dynamic": float(int((speeds > DYNAMIC).sum()) >= enough),
        "motion_smoothness": smoothness,
        "temporal_consistency": consistency,
    }


def shrunk(frames: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 h w"]:
    """Frames whose short side is ``LINES`` pixels, by area averaging; smaller ones as they are."""
    scale = LINES / min(frames.shape[-2:])
    if scale >= 1:
        return frames
    size = [max(1, round(side * scale)) for side in frames.shape[-2:]]
    return F.interpolate(frames, size=size, mode="area")


def fastest(flow: Flow) -> Float[Tensor, " N"]:
    """Return the mean displacement in pixels of the fastest 5 % of the pixels."""
    lengths = flow.shift.norm(dim=1).flatten(1)
    return lengths.topk(max(1, int(FASTEST * lengths.shape[1]))).values.mean(1)


def steadiness(flow: Flow) -> float:
    """1 - sum |b - a| / sum (|a| + |b|) over blocks that go by ``a`` and then by ``b``; 1 if none moves."""
    first, second = flow.shift[:-1], flow.shift[1:]
    place = _reached(first)
    after, known = _at(second, place), _at(flow.known[1:, None].float(), place)[:, 0] > 0
    both = (flow.known[:-1] & known)[:, None]
    turns = ((after - first) * both).norm(dim=1).sum()
    paths = ((first * both).norm(dim=1) + (after * both).norm(dim=1)).sum()
    return float(1 - turns / paths) if paths > 0 else 1.0


def flow(before: Float[Tensor, "N 3 h w"], after: Float[Tensor, "N 3 h w"]) -> Flow:
    """Return the displacements of the blocks of N frames, pixels in [0, 1], to N frames of the same size."""
    height, width = before.shape[-2:]
    reach = max(1, round(REACH * min(height, width)))
    count = max(1, _AT_ONCE // ((2 * reach + 3) ** 2 * height * width))
    parts = []
    for a, b in zip(before.split(count), after.split(count), strict=True):
        there, back = (_lowest(costs) for costs in _costs(a, b, reach))
        returned = (there + _at(back, _reached(there))).norm(dim=1) <= 1
        contrast = (_blocks(a.square()) - _blocks(a).square()).mean(1)
        known = returned & (contrast > NOISE)
        parts.append((_agreed(there, known), known))
    shift, known = (torch.cat(part) for part in zip(*parts, strict=True))
    return Flow(shift, known)


def _agreed(shift: Tensor, known: Tensor) -> Tensor:
    """Return the medians of the known displacements around each known block, along each axis; 0 elsewhere.
    Without them the fastest blocks would be the mismatched ones.
    """
    beside = (BLOCK // 2,) * 4
    around = F.pad(torch.where(known[:, None], shift, torch.nan), beside, value=torch.nan)
    medians = around.unfold(2, BLOCK, 1).unfold(3, BLOCK, 1).flatten(4).nanmedian(-1).values
    return torch.where(known[:, None], medians, 0.0)


def _blocks(pixels: Tensor) -> Tensor:
    """Means over blocks, those at the border over what there is."""
    for block in ((BLOCK, 1), (1, BLOCK)):
        padding = (block[0] // 2, block[1] // 2)
        pixels = F.avg_pool2d(pixels, block, 1, padding, count_include_pad=False)
    return pixels


def _costs(a: Tensor, b: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Return what is left of a's blocks displaced into b, and of b's into a: two (2 R + 3, 2 R + 3, N, h, w),
    R the reach, by how far down and right. Infinite outside the frame and beyond the reach.
    """
    height, width = a.shape[-2:]
    forth = torch.full((2 * reach + 3, 2 * reach + 3, len(a), height, width), torch.inf)
    back, centre = forth.clone(), reach + 1
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            here = (..., _overlap(height, -down), _overlap(width, -right))
            there = (..., _overlap(height, down), _overlap(width, right))
            change = a[here] - b[there]
            means = _blocks(torch.cat([change, change.square().mean(1, keepdim=True)], 1))
            left = (means[:, -1] - means[:, :-1].square().mean(1)).clamp_min(0)
            left = left + 1e-7 * (down**2 + right**2)  # of equal costs the smallest displacement
            forth[(centre + down, centre + right, *here)] = left
            back[(centre - down, centre - right, *there)] = left
    return forth, back


def _overlap(size: int, shift: int) -> slice:
    """Return the part of an axis that is still inside when it is displaced by -``shift``."""
    return slice(max(0, shift), size + min(0, shift))


def _lowest(costs: Tensor) -> Tensor:
    """(N, 2, h, w) displacements of lowest cost, to a fraction of a pixel: the minimum of a parabola through
    the costs beside the lowest, along each axis. 0 where it explains less than half of what has changed.
    """
    side, flat = costs.shape[0], costs.flatten(0, 1)
    best = flat.argmin(0)
    cost = lowest = flat.gather(0, best[None])[0]
    parts = []
    for whole, stride in ((best // side, side), (best % side, 1)):
        below, above = (flat.gather(0, (best + way * stride)[None])[0] for way in (-1, 1))
        bend = below - 2 * cost + above
        fits = torch.isfinite(bend) & (bend > 0)
        slope = torch.where(fits, below - above, 0.0)
        part = (slope / (2 * torch.where(fits, bend, 1.0))).clamp(-0.5, 0.5)
        lowest = lowest - slope * part / 4
        parts.append(whole - side // 2 + part)
    still = costs[side // 2, side // 2]
    moved = (still > NOISE) & (lowest <= still / 2)
    return torch.stack(parts, 1) * moved[:, None]


def _reached(shift: Tensor) -> Tensor:
    """(N, h w) indices of the pixels nearest to where displaced ones are."""
    height, width = shift.shape[-2:]
    down = (torch.arange(height)[:, None] + shift[:, 0]).round().long().clamp(0, height - 1)
    right = (torch.arange(width) + shift[:, 1]).round().long().clamp(0, width - 1)
    return (down * width + right).flatten(1)


def _at(values: Tensor, place: Tensor) -> Tensor:
    """``values`` (N, C, h, w) at those indices."""
    picked = values.flatten(2).gather(2, place[:, None].expand(-1, values.shape[1], -1))
    return picked.reshape(values.shape)
