"""FID and LPIPS: against their definitions in numpy, in an evaluation, in its files; and without weights."""

import builtins
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.functional.image.lpips import _NoTrainLpips

from diffalign.cli.distances import perceptual_notes, perceptual_settings
from diffalign.cli.evaluate import read, summary
from diffalign.data.prompts.prompt_sets import PromptSet
from diffalign.errors import UserError
from diffalign.evaluation import running
from diffalign.evaluation.evaluate import judged
from diffalign.evaluation.measuring.feature_networks import (
    ensure_weights,
    load_inception,
    load_lpips,
    lpips_of,
)
from diffalign.evaluation.measuring.image_statistics import diversity_change
from diffalign.evaluation.measuring.measuring import Measured
from diffalign.evaluation.measuring.perceptual import (
    Fid,
    Perceptual,
    PerceptualSettings,
    fids,
    lpips_diversities,
    lpips_pairs,
    measure_perceptual,
    real_images,
)
from diffalign.evaluation.measuring.store import NamedReward
from diffalign.evaluation.report.report import RunFacts, contest_data, render
from diffalign.evaluation.running import Entrant, evaluate_models
from diffalign.media.videos import Video
from tests.evaluation.fakes import FilmingPipeline, PaintingPipeline, brightness


class Features(nn.Module):
    """Eight features of an image of any size; counts the images that it sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.seen = nn.Linear(48, 8), 0

    def forward(self, images):
        assert images.dtype == torch.uint8
        self.seen += len(images)
        small = nn.functional.adaptive_avg_pool2d(images.float() / 255, 4)
        return torch.tanh(3 * self.linear(small.flatten(1)))


def pictures(count, seed, lift=0, side=36):
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 180, (count, 4, 4, 3)) + lift
    return [Image.fromarray(np.kron(b, np.ones((side // 4, side // 4, 1))).astype(np.uint8)) for b in blocks]


def frechet(first, second):
    """Return the distance of the Gaussians of two tables of features, by its definition."""
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    gap = first.mean(0) - second.mean(0)
    return float(gap @ gap + np.trace(a + b - 2 * np.real(sqrtm(a @ b))))


def features_of(network, images):
    stack = torch.stack([torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1) for i in images])
    with torch.no_grad():
        return network(stack).double().numpy()


def test_fid_is_the_frechet_distance_of_features():
    network, real = Features(), pictures(70, 0)
    sets = {"": pictures(50, 1, 10), "aligned": pictures(41, 2, 60), "same": real}
    found = fids(network, real, sets, progress=False)
    reference = features_of(network, real)
    for name, images in sets.items():
        assert found[name] == pytest.approx(frechet(reference, features_of(network, images)), abs=1e-4)
    assert found["same"] == pytest.approx(0, abs=1e-4) and found["aligned"] > found[""] > 0.01


def test_fid_takes_images_of_several_sizes_each_once():
    network = Features()
    mixed = [*pictures(5, 0, side=36), *pictures(4, 1, side=64), *pictures(3, 2, side=36)]
    found = fids(network, mixed, {"a": pictures(12, 3)}, progress=False)
    assert network.seen == 12 + 12 + 1  # torchmetrics looks at one more, for the number of features
    parts = [
        features_of(network, mixed[:5]),
        features_of(network, mixed[5:9]),
        features_of(network, mixed[9:]),
    ]
    expected = frechet(np.concatenate(parts), features_of(network, pictures(12, 3)))
    assert found["a"] == pytest.approx(expected, abs=1e-4)


def lpips_network():
    """AlexNet's architecture with random weights, and the published linear layers."""
    torch.manual_seed(1)
    return _NoTrainLpips(net="alex", pnet_rand=True)


def by_hand(network, first, second):
    """LPIPS by its definition: sum over layers of the mean over places of sum_c w_c (a_c - b_c)^2, where
    features are of unit length at every place."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    layers = []
    for image in (first, second):
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
        layers.append(network.net(((pixels - shift) / scale)[None]))
    total = 0.0
    for place, (a, b) in enumerate(zip(*layers, strict=True)):
        a, b = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-8) for x in (a, b))
        weight = dict(network.named_parameters())[f"lin{place}.model.1.weight"]
        total += float((weight * (a - b) ** 2).sum(1).mean())
    return total


def test_lpips_is_its_definition_and_zero_for_equal_images():
    network = lpips_network()
    first, second = pictures(3, 0), pictures(3, 1, 60)
    found = lpips_pairs(lpips_of(network), [*zip(first, second, strict=True), (first[0], first[0])], False)
    expected = [by_hand(network, a, b) for a, b in zip(first, second, strict=True)]
    assert found == pytest.approx([*expected, 0.0], rel=1e-4, abs=1e-7) and min(expected) > 1e-3


def test_lpips_of_videos_is_the_mean_over_frames():
    network = lpips_of(lpips_network())
    a, b = pictures(4, 0), pictures(4, 1)
    frames = lambda images: Video(  # noqa: E731
        torch.stack([torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1) for i in images]), 8.0
    )
    found = lpips_pairs(network, [(frames(a), frames(b))], False)
    singles = lpips_pairs(network, list(zip(a, b, strict=True)), False)
    assert found == pytest.approx([np.mean(singles)], rel=1e-4)


def test_lpips_diversity_is_the_mean_over_pairs_of_a_prompt():
    network, images = lpips_of(lpips_network()), pictures(4, 0)
    found = lpips_diversities(network, images, ["a", "b", "a", "a"], False)
    pairs = [(images[0], images[2]), (images[0], images[3]), (images[2], images[3])]
    assert found == {"a": pytest.approx(np.mean(lpips_pairs(network, pairs, False)))}


@pytest.mark.parametrize(("side", "other"), [(36, 64), (16, 16)])
def test_lpips_refuses_pairs_of_two_sizes_and_small_images(side, other):
    pair = (pictures(1, 0, side=side)[0], pictures(1, 0, side=other)[0])
    with pytest.raises(UserError, match=f"{side} x {side} pixels.*32 pixels or more"):
        lpips_pairs(lpips_of(lpips_network()), [pair], False)


@pytest.mark.parametrize(
    ("images", "real", "words"),
    [
        (99, 50_000, "99 images against 50,000 real ones.*covariance of the 2,048 features is singular"),
        (5000, 5000, "10,000 and more are usual"),
        (10_000, 10_000, "^$"),
    ],
)
def test_a_fid_says_what_its_numbers_of_images_mean(images, real, words):
    assert re.search(words, Fid(10.0, 9.0, images, real).caution)


def save(images, folder):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    return folder


def settings(folder, network=None):
    return PerceptualSettings(folder, True, lambda: network or Features(), lambda: lpips_of(lpips_network()))


def test_measured_of_several_models_against_one_base(tmp_path):
    real = save(pictures(20, 5), tmp_path / "real" / "sub").parent
    base, near, far = pictures(6, 0), pictures(6, 0, 10), pictures(6, 9, 70)
    prompts = ["a", "b", "c", "a", "b", "c"]
    found = measure_perceptual(settings(real), base, {"near": near, "far": far}, prompts, progress=False)
    assert found["near"].fid.base == found["far"].fid.base and found["near"].fid.real == 20
    assert found["far"].fid.aligned > found["near"].fid.aligned and found["near"].fid.images == 6
    assert len(found["far"].to_base) == 6 and np.mean(found["far"].to_base) > np.mean(found["near"].to_base)
    assert found["near"].base_diversity == found["far"].base_diversity
    assert set(found["near"].aligned_diversity) == {"a", "b", "c"}
    only = measure_perceptual(PerceptualSettings(None, False), base, {"near": near}, prompts, progress=False)
    assert only["near"] == Perceptual(None, (), {}, {})


def evaluation(perceptual):
    prompts = [f"p{i % 8}" for i in range(16)]
    random = np.random.default_rng(0)
    measured = [
        Measured(
            {"r": list(random.normal(lift, 0.1, 16))}, {"saturation": [0.5] * 16}, [np.zeros((2, 2, 3))] * 16
        )
        for lift in (0, 1)
    ]
    return judged(*measured, prompts, "image", resamples=200, perceptual=perceptual)


def test_an_evaluation_holds_fid_distance_and_diversity_and_warns_of_a_collapse():
    spread = {f"p{i}": 0.5 + i / 100 for i in range(8)}
    fallen = {prompt: value / 2 for prompt, value in spread.items()}
    to_base = tuple(i / 16 for i in range(16))
    found = evaluation(Perceptual(Fid(20.0, 30.0, 16, 100), to_base, spread, fallen))
    assert found.fid.aligned == 30.0 and found.lpips_to_base.value == pytest.approx(np.mean(to_base))
    assert found.lpips_to_base.low < found.lpips_to_base.value < found.lpips_to_base.high
    (change,) = [c for c in found.statistics if c.name == "lpips_diversity"]
    assert change == diversity_change("lpips_diversity", spread, fallen, 0)
    assert change.change.value == pytest.approx(-np.mean(list(spread.values())) / 2) and change.flagged
    assert any("LPIPS diversity within a prompt fell" in line for line in found.alarm)
    without = evaluation(None)
    assert without.fid is None and without.lpips_to_base is None and without.rewards == found.rewards


def bench(tmp_path, perceptual, pipelines=None):
    opened = pipelines or [PaintingPipeline(), PaintingPipeline(lift=40)]
    return evaluate_models(
        lambda: opened[0],
        [Entrant("aligned", "aligned", lambda: opened[1])],
        PromptSet(("a", "b", "c"), {}),
        [NamedReward("light", "light", lambda: brightness)],
        running.DEFAULTS if pipelines else running.SamplingSettings(height=36, width=36),
        output=tmp_path / "out",
        images_per_prompt=2,
        progress=False,
        perceptual=perceptual,
    )


def test_json_page_and_summary_of_an_evaluation(tmp_path):
    real = save(pictures(30, 5), tmp_path / "real")
    found = bench(tmp_path, settings(real))
    facts = {"aligned": RunFacts("dpo", versions={})}
    data = json.loads(json.dumps(contest_data(found, facts)))
    network = Features()
    expected = frechet(
        features_of(network, pictures(30, 5)),
        features_of(network, [Image.open(file) for file in found.aligned["aligned"]]),
    )
    assert data["fid"]["aligned"] == pytest.approx(expected, abs=1e-4)
    assert (data["fid"]["images"], data["fid"]["real"]) == (6, 30) and "singular" in data["fid"]["caution"]
    assert data["fid"]["change"] == data["fid"]["aligned"] - data["fid"]["base"]
    low, high = data["lpips_to_base"]["ci95"]
    assert 0 < low <= data["lpips_to_base"]["value"] <= high
    assert data["models"]["aligned"]["image_statistics"]["lpips_diversity"]["base"] > 0
    page = render(found, facts)
    assert "FID and LPIPS" in page and "30 real images" in page and "LPIPS to the base" in page
    assert "LPIPS diversity within a prompt" in page
    said = summary(data)
    assert f"FID {data['fid']['base']:.2f} -> {data['fid']['aligned']:.2f}" in said
    assert "6 images of each against 30 real ones" in said and "LPIPS diversity" in said
    without = bench(tmp_path, None)
    plain = contest_data(without, facts)
    assert "fid" not in plain and "lpips_to_base" not in plain and "FID" not in render(without, facts)


def test_what_cannot_be_measured_is_said_before_anything_is_drawn(tmp_path):
    (tmp_path / "empty").mkdir()
    pipelines = [PaintingPipeline(), PaintingPipeline()]

    def missing():
        raise UserError("no weights")

    for asked, words in (
        (PerceptualSettings(tmp_path / "empty", False, Features), "0 images in"),
        (PerceptualSettings(None, True, Features, missing), "no weights"),
    ):
        with pytest.raises(UserError, match=words):
            bench(tmp_path, asked, pipelines)
    assert not pipelines[0].calls
    real = save(pictures(3, 0), tmp_path / "real")
    films = [FilmingPipeline(), FilmingPipeline()]
    with pytest.raises(UserError, match="--fid compares images, and FilmingPipeline draws videos"):
        bench(tmp_path, PerceptualSettings(real, False, Features), films)
    assert not films[0].calls


def test_real_images_are_found_in_subfolders_and_two_at_least(tmp_path):
    save(pictures(1, 0), tmp_path / "a")
    with pytest.raises(UserError, match="1 images in"):
        real_images(tmp_path)
    save(pictures(2, 0), tmp_path / "a" / "b")
    (tmp_path / "notes.txt").write_text("x")
    assert len(real_images(tmp_path)) == 3
    with pytest.raises(UserError, match="is no folder"):
        real_images(tmp_path / "none")


ARGV = ["--base", "a", "--aligned", "b", "--prompts", "p", "--rewards", "jpeg", "--device", "cpu"]


def test_options_become_settings_and_notes(tmp_path):
    assert perceptual_settings(read(ARGV)) is None
    real = save(pictures(2, 0), tmp_path / "real")
    args = read([*ARGV, "--fid", str(real), "--lpips"])
    asked = perceptual_settings(args)
    assert asked.real == real and asked.lpips
    once = evaluation(Perceptual(Fid(2.0, 3.0, 16, 100), (0.1,) * 16, {}, {}))
    notes = perceptual_notes(once, args)
    assert len(notes) == 2 and "biased upward" in notes[0] and "--images-per-prompt" in notes[1]
    with pytest.raises(UserError, match="no folder"):
        perceptual_settings(read([*ARGV, "--fid", str(tmp_path / "none")]))


@pytest.mark.parametrize("load", [load_inception, load_lpips])
def test_weights_that_are_not_here_offline_are_a_user_error(load, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"checkpoints/.*\.pth are missing and HF_HUB_OFFLINE is set; put a"):
        load("cpu")


def test_weights_are_downloaded_by_their_digest_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    source = tmp_path / "net-01234567.pth"
    source.write_bytes(b"weights")
    with pytest.raises(UserError, match=r"cannot fetch the weights .*net-01234567\.pth .*invalid hash value"):
        ensure_weights("FID", source.as_uri())
    named = source.rename(tmp_path / f"net-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth")
    file = ensure_weights("FID", named.as_uri())
    assert file.read_bytes() == b"weights" and file.parent == tmp_path / "torch" / "hub" / "checkpoints"
    named.unlink()
    assert ensure_weights("FID", named.as_uri()) == file  # from the cache
    with pytest.raises(UserError, match="URLError"):
        ensure_weights("LPIPS", (tmp_path / "gone-01234567.pth").as_uri())


def test_weights_in_the_cache_are_loaded_by_both(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    from torchvision.models import AlexNet_Weights, alexnet

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    network = alexnet()
    torch.save(network.state_dict(), folder / Path(AlexNet_Weights.IMAGENET1K_V1.url).name)
    (found,) = lpips_pairs(load_lpips("cpu"), [(pictures(1, 0)[0], pictures(1, 1)[0])], False)
    assert found > 0
    torch.save({"fc.bias": torch.zeros(1008)}, folder / Path(URL_INCEPTION_V3).name)
    states = []  # the network as it is made, since its 24 million weights are not here
    monkeypatch.setattr(
        FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: states.append(state)
    )
    features = load_inception("cpu")(torch.zeros(2, 3, 40, 36, dtype=torch.uint8))
    assert features.shape == (2, 2048) and set(states[0]) == {"fc.bias"}


@pytest.mark.parametrize("load", [load_inception, load_lpips])
def test_without_the_extra_its_name_is_said(load, monkeypatch):
    real = builtins.__import__

    def importing(name, *rest, **options):
        if name.startswith(("torchmetrics", "torch_fidelity")):
            raise ModuleNotFoundError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(UserError, match=r"pip install 'diffalign\[metrics\]'"):
        load("cpu")
