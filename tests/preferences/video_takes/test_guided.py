"""Guided pairs: the sampler against closed forms and the published trajectories, files on a tiny pipeline."""

import json
import math
from argparse import ArgumentTypeError
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.cli import main
from diffalign.cli.video_pairs import _range
from diffalign.config.schema import ModelConfig
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.randomness import derive
from diffalign.diffusion.samplers import sample, timesteps
from diffalign.errors import UserError
from diffalign.models.loading import load
from diffalign.preferences.video_takes.clips import Clip, read_clips
from diffalign.preferences.video_takes.guided import denoised, even_times, model_times, noised, steps_left
from diffalign.preferences.video_takes.make import PairSettings, make_pairs, times_of
from tests.helpers import VECTORS, Affine, sd_path
from tests.tiny_pipelines import make_sd3, make_sd15

GOLDEN = VECTORS / "densedpo.npz"
GUIDED = sorted({key.split("/")[0] for key in np.load(GOLDEN) if key.startswith("guided")})


@dataclass
class Published:
    """v = (0.1 + t / 2) x + 0.05, the toy of the published trajectories."""

    target: str = "flow"
    path: RectifiedFlow = RectifiedFlow()

    def __call__(self, x_t, t, cond):
        return (0.1 + 0.5 * t.reshape(-1, *(1,) * (x_t.ndim - 1))) * x_t + 0.05


@pytest.mark.parametrize("case", GUIDED or ["none"])
def test_golden_guided_pairs(case):
    """The trajectory whose steps take noise away; the printed sign goes elsewhere."""
    f = np.load(GOLDEN)
    if case == "none":
        pytest.skip("among the shipped vectors there is no guided_*")
    eta, steps = (float(part) for part in case.removeprefix("guided_eta").split("_N"))
    times = even_times(eta, int(steps))
    for member in (0, 1):
        published = torch.from_numpy(f[f"{case}/minus/traj_{member}"])
        assert len(published) == len(times)
        for start in (0, len(times) - 2):
            got = denoised(Published(), published[start], times[start:], {})
            np.testing.assert_allclose(got.numpy(), published[-1].numpy(), atol=1e-12)
        if f"{case}/plus_literal/traj_{member}" in f:
            literal = f[f"{case}/plus_literal/traj_{member}"][-1]
            assert not np.allclose(got.numpy(), literal, atol=1e-3)


def test_euler_by_hand():
    """x <- x - v / N, n = round(eta N) times, in plain numpy."""
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 1, 3, 5, 4, 4))
    n, steps = 27, 40
    eta = 0.68  # 27.2 steps
    x = (1 - n / steps) * x0 + n / steps * eps
    states = [x]
    for k in range(n, 0, -1):
        states.append(states[-1] - ((0.1 + 0.5 * k / steps) * states[-1] + 0.05) / steps)
    times = even_times(eta, steps)
    assert len(times) == n + 1 and times[0] == n / steps and times[-1] == 0
    start = noised(Published(), torch.from_numpy(x0), torch.from_numpy(eps), times)
    np.testing.assert_allclose(start.numpy(), x, atol=1e-14)
    got = denoised(Published(), start, times, {})
    np.testing.assert_allclose(got.numpy(), states[-1], atol=1e-12)


def test_a_perfect_model_gives_the_clip_back():
    """With v = eps - x0 the straight way back leads to x0, however far and in however few steps: the sign is
    right.
    """
    x0, eps = torch.randn(2, 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class Perfect(Published):
        def __call__(self, x_t, t, cond):
            return eps - x0

    for eta, steps in ((0.65, 40), (0.8, 5), (1.0, 1)):
        times = even_times(eta, steps)
        torch.testing.assert_close(denoised(Perfect(), noised(Perfect(), x0, eps, times), times, {}), x0)


def test_variance_preserving_models_take_ddims_last_steps():
    """All of them from pure noise are the sampler that everything else here uses."""
    path = sd_path()
    denoiser = Affine(path, torch.tensor(0.1).double(), torch.tensor(0.02).double())
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = lambda steps: timesteps(steps, path.steps)  # noqa: E731
    whole = denoised(denoiser, x, model_times(1.0, 20, grid), {})
    torch.testing.assert_close(whole, sample(denoiser, x, {}, torch.Generator(), 20))
    part = model_times(0.7, 20, grid)
    assert len(part) == 15 and torch.equal(part, timesteps(20)[-15:])
    alpha, sigma = path.coefficients(part[:1])
    torch.testing.assert_close(noised(denoiser, x, x + 1, part), alpha * x + sigma * (x + 1))


def test_eta_is_drawn_once_a_pair_from_its_range():
    clip, settings = Clip("a.mp4", "a", None), PairSettings(16, 16)
    etas = [settings.eta_of(replace(clip, name=str(i)), n) for i in range(100) for n in (0, 1)]
    assert len(set(etas)) == 200 and 0.65 <= min(etas) < 0.66 and 0.79 < max(etas) < 0.8
    assert np.mean(etas) == pytest.approx(0.725, abs=0.01)
    assert replace(settings, seed=1).eta_of(clip, 0) != settings.eta_of(clip, 0)
    assert replace(settings, eta=(0.7, 0.7)).eta_of(clip, 3) == 0.7
    assert [steps_left(eta, 40) for eta in (0.65, 0.7, 0.8, 1.0, 0.001)] == [26, 28, 32, 40, 1]


@pytest.mark.parametrize("eta", [(0.0, 0.5), (0.8, 0.65), (0.5, 1.1)])
def test_bad_ranges(eta):
    with pytest.raises(UserError, match="allowed: 0 < low <= high <= 1"):
        PairSettings(16, 16, eta=eta)


def test_one_number_or_a_range_of_eta():
    assert _range("0.7") == (0.7, 0.7) and _range("0.65,0.8") == (0.65, 0.8)
    for text in ("0.5,0.6,0.7", "", "0.5,"):
        with pytest.raises(ArgumentTypeError, match="allowed: LOW,HIGH or one number"):
            _range(text)


# clips


def clips_folder(folder, count=3, size=(40, 24)):
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"c{i}.png")
        (folder / f"c{i}.txt").write_text(f"clip {i}\n")
    return folder


def test_clips_of_a_folder_and_of_json_lines(tmp_path):
    folder = clips_folder(tmp_path / "clips")
    assert [(c.name, c.prompt) for c in read_clips(str(folder))] == [
        (f"c{i}.png", f"clip {i}") for i in range(3)
    ]
    assert len(read_clips(str(folder), 2)) == 2
    rows = tmp_path / "clips.jsonl"
    rows.write_text(json.dumps({"caption": "one", "video": "clips/c1.png", "fps": 3}) + "\n")
    (clip,) = read_clips(str(rows))
    assert clip == Clip("clips/c1.png", "one", folder / "c1.png")
    (folder / "c1.txt").unlink()
    with pytest.raises(UserError, match=r"no caption for c1\.png; needed: c1\.txt"):
        read_clips(str(folder))
    rows.write_text('{"prompt": "x", "video": "gone.mp4"}')
    with pytest.raises(UserError, match=r"clips\.jsonl line 1: no such file: gone\.mp4"):
        read_clips(str(rows))
    (folder / "c1.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(UserError, match=r"c1\.txt line 1: not UTF-8 text"):
        read_clips(str(folder))
    (folder / "c1.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"c1\.txt is empty; needed: the caption of c1\.png"):
        read_clips(str(folder))
    rows.write_text('{"prompt": " ", "video": "clips/c0.png"}')
    with pytest.raises(UserError, match=r"line 1: needed .* found prompt, video"):
        read_clips(str(rows))
    rows.write_text('{"prompt": "x"}')
    with pytest.raises(UserError, match=r"line 1: needed .* found prompt"):
        read_clips(str(rows))
    with pytest.raises(UserError, match="nothing to read there"):
        read_clips(str(tmp_path / "nowhere"))


# files


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return load(ModelConfig(path=str(make_sd3(tmp_path_factory.mktemp("sd3")))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clips_folder(tmp_path_factory.mktemp("real") / "clips")


def few(model, **changes):
    size = 2 * model.multiple
    return PairSettings(size, size, steps=4, guidance=2.0, **changes)


def read(made):
    rows = [json.loads(line) for line in made.path.read_text().splitlines()]
    for row in rows:
        row["pixels"] = [np.asarray(Image.open(made.path.parent / name)) for name in row["images"]]
    return rows


def test_pairs_of_pictures_depend_on_seed_and_name_alone(sd3, folder, tmp_path):
    clips = read_clips(str(folder))
    whole = make_pairs(sd3, clips, few(sd3), tmp_path / "a", progress=False)
    rows = read(whole)
    assert whole.pairs == 3 and [row["prompt"] for row in rows] == ["clip 0", "clip 1", "clip 2"]
    assert all(0.65 <= row["eta"] <= 0.8 and (row["pixels"][0] != row["pixels"][1]).any() for row in rows)
    shares = [
        make_pairs(sd3, clips, few(sd3), tmp_path / "b", rank=rank, world=2, progress=False)
        for rank in (1, 0)
    ]
    assert [share.pairs for share in shares] == [1, 2]
    for one, other in zip(rows, read(shares[1]), strict=True):
        assert one["images"] == other["images"] and np.array_equal(one["pixels"], other["pixels"])
    other_seed = read(make_pairs(sd3, clips[:1], few(sd3, seed=1), tmp_path / "c", progress=False))
    assert other_seed[0]["eta"] != rows[0]["eta"] and other_seed[0]["images"] != rows[0]["images"]


def test_what_is_there_is_not_made_again(sd3, folder, tmp_path):
    clips = read_clips(str(folder))
    made = make_pairs(sd3, clips[:2], few(sd3, pairs=2), tmp_path, progress=False)
    assert made.pairs == 4 and len({name for row in read(made) for name in row["images"]}) == 8
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.png")}
    gone = sorted(files)[0]
    gone.unlink()
    again = make_pairs(sd3, clips[:2], few(sd3, pairs=2), tmp_path, progress=False)
    now = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.png")}
    pair = {gone, gone.with_name(gone.name.replace("-0.png", "-1.png"))}
    assert again.pairs == 4 and {file for file in files if now[file] != files[file]} == pair


def test_a_damaged_clip_is_left_out_and_named(sd3, folder, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    clips = [Clip("broken.png", "x", broken), *read_clips(str(folder), 1)]
    made = make_pairs(sd3, clips, few(sd3), tmp_path / "out", progress=False)
    assert made.pairs == 1 and made.unreadable[0].startswith("broken.png: not an image in one of the formats")
    assert [row["prompt"] for row in read(made)] == ["clip 0"]


def test_at_eta_one_nothing_of_the_clip_is_left(sd3, folder, tmp_path):
    """Two clips of one caption and name give the same two independent samples."""
    white, black = (tmp_path / name for name in ("white.png", "black.png"))
    for path, value in ((white, 255), (black, 0)):
        Image.new("RGB", (32, 32), (value,) * 3).save(path)
    settings = few(sd3, eta=(1.0, 1.0))
    rows = [
        read(make_pairs(sd3, [Clip("c", "a cat", path)], settings, tmp_path / path.stem, progress=False))[0]
        for path in (white, black)
    ]
    assert np.array_equal(rows[0]["pixels"], rows[1]["pixels"])
    assert (rows[0]["pixels"][0] != rows[0]["pixels"][1]).any()


def test_which_times(sd3, tmp_path):
    shape = sd3.latent_shape(2 * sd3.multiple, 2 * sd3.multiple)
    even, own = even_times(0.7, 10), sd3.grid(10, shape)[-8:]
    assert own[0] > even[0]  # the shift
    for grid, eta, expected in (("auto", 0.7, even), ("even", 0.7, even), ("model", 0.7, own)):
        assert torch.equal(times_of(sd3, replace(few(sd3), grid=grid, steps=10), eta, shape), expected)
    whole = times_of(sd3, replace(few(sd3), steps=10), 1.0, shape)
    assert torch.equal(whole, sd3.grid(10, shape)) and whole[0] == 1
    sd15 = load(ModelConfig(path=str(make_sd15(tmp_path))))
    shape = sd15.latent_shape(16, 16)
    assert torch.equal(times_of(sd15, PairSettings(16, 16, steps=10), 0.7, shape), timesteps(10)[-8:])
    clip = Clip("c", "a", tmp_path / "c.png")
    for settings, words in (
        ({"grid": "even"}, r"grid='even' with sd15, a variance-preserving model"),
        ({"frames": 9}, r"frames=9, fps=None with sd15, a model of images; allowed: neither"),
    ):
        with pytest.raises(UserError, match=words):
            make_pairs(sd15, [clip], PairSettings(16, 16, steps=10, **settings), tmp_path / "out")


def test_noise_is_the_seeds_and_names_own(sd3, folder, tmp_path):
    """What the file holds, recomputed from the parts: one step, no guidance."""
    (clip,) = read_clips(str(folder), 1)
    size = 2 * sd3.multiple
    settings = PairSettings(size, size, steps=1, guidance=1.0, eta=(0.8, 0.8))
    row = read(make_pairs(sd3, [clip], settings, tmp_path, progress=False))[0]
    eps = torch.randn(
        (1, *sd3.latent_shape(size, size)),
        generator=torch.Generator().manual_seed(derive(0, "noise", "c0.png", 0, 1)),
    )
    cond = sd3.encode_prompts(["clip 0"])
    with torch.no_grad():  # one step of one: from pure noise, at time 1
        clean = eps - sd3.denoiser()(eps, torch.ones(1), cond)
    pixels = (sd3.decode(clean)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    np.testing.assert_array_equal(row["pixels"][1], pixels)
    assert math.isclose(row["eta"], 0.8)


def test_the_command(sd3, folder, tmp_path, capsys):
    size = str(2 * sd3.multiple)
    argv = ["video-pairs", sd3.source, "--videos", str(folder), "--height", size, "--width", size]
    argv += ["--steps", "2", "--output", str(tmp_path / "pairs"), "--limit", "1"]
    assert main([*argv, "--eta", "0.5"]) == 0
    said = capsys.readouterr().err
    assert "1 pair in" in said and "label-segments" not in said  # which is for videos
    row = json.loads((tmp_path / "pairs" / "pairs.jsonl").read_text())
    assert row["eta"] == 0.5 and len(row["images"]) == 2
    argv[argv.index("--width") + 1] = "17"
    assert main(argv) == 2
    assert "argument --width: 17 is no multiple of 8" in capsys.readouterr().err
    argv[argv.index("--width") + 1] = str(sd3.multiple + 8)
    assert main(argv) == 2
    refused = f"{size} x {sd3.multiple + 8} pixels; allowed with sd3: multiples of {sd3.multiple}"
    assert refused in capsys.readouterr().err
    argv[argv.index("--width") + 1] = size
    assert main([*argv, "--eta", "much"]) == 2
    assert "'much'; allowed: LOW,HIGH" in capsys.readouterr().err


def test_no_pair_at_all_is_an_error(sd3, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no pair was made of 1 clips; the first: broken\.png: not an image"):
        make_pairs(sd3, [Clip("broken.png", "x", broken)], few(sd3), tmp_path / "out", progress=False)
