"""EDM's preconditioning: the path against diffusers, the loss against Karras et al. 2022, a run."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from diffalign.cli import main
from diffalign.config.schema import ModelConfig
from diffalign.diffusion.likelihood import PerSample, denoising_error
from diffalign.diffusion.paths import EDM, path_from_config
from diffalign.diffusion.samplers import DDIM, trajectory
from diffalign.errors import UserError
from diffalign.export.single_file import write_single_file
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora_base import prediction_metadata
from diffalign.runs.align import align
from diffalign.types import Cond, Noised, Target
from tests.models.inputs import conditions
from tests.runs.test_align import small
from tests.tiny_pipelines import make_sdxl

SCHEDULERS = {
    "dpm": EDMDPMSolverMultistepScheduler(),
    "euler-v": EDMEulerScheduler(prediction_type="v_prediction", sigma_max=40.0, sigma_data=1.0),
    "exponential": EDMEulerScheduler(sigma_schedule="exponential", num_train_timesteps=300),
}


def make_edm(folder: Path, scheduler: Any = SCHEDULERS["dpm"]) -> Path:
    """Make an SDXL of Playground 2.5's kind: its scheduler, and an autoencoder of latents of std 1/2."""
    make_sdxl(folder)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    vae = json.loads((folder / "vae" / "config.json").read_text())
    vae["scaling_factor"] = 0.5
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_edm(tmp_path_factory.mktemp("edm") / "model")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_path_is_the_schedulers_table_and_table_1_of_the_paper(name: str) -> None:
    scheduler: Any = SCHEDULERS[name]
    path, target = path_from_config(scheduler.config)
    assert isinstance(path, EDM) and target == "v" and path.negated is (name != "euler-v")
    data, sigma = scheduler.config.sigma_data, scheduler.sigmas[:-1].flip(0).double()  # ends with a 0
    t = torch.linspace(0, 1, len(sigma), dtype=torch.float64)
    torch.testing.assert_close(path.sigma(t), sigma, rtol=2e-5, atol=0)
    torch.testing.assert_close(path.model_time(t), scheduler.timesteps.flip(0).double(), rtol=2e-5, atol=1e-5)
    s = sigma.numpy()
    alpha, noise = (c.numpy() for c in path.coefficients(t))
    np.testing.assert_allclose(noise, s / np.sqrt(s**2 + data**2), rtol=1e-4)  # c_in sigma
    np.testing.assert_allclose(alpha, data / np.sqrt(s**2 + data**2), rtol=1e-4)  # c_in sigma_data
    scheduler.set_timesteps(5)
    torch.testing.assert_close(path.sigma(path.grid(4)), scheduler.sigmas[:-1].double(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ["dpm", "euler-v"])
def test_the_error_is_the_papers_loss_through_diffusers_preconditioning(tmp_path: Path, name: str) -> None:
    scheduler: Any = SCHEDULERS[name]
    model = load(ModelConfig(path=str(make_edm(tmp_path / "model", scheduler))))
    data = scheduler.config.sigma_data
    g = torch.Generator().manual_seed(0)
    shape = model.latent_shape(32, 32)
    x0, eps = data * torch.randn(3, *shape, generator=g), torch.randn(3, *shape, generator=g)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    cond = conditions(model, ["a", "a red circle", "blue"])
    alpha, noise = (c.float().reshape(-1, 1, 1, 1) for c in model.path.coefficients(t))
    z = Noised(x0 / data, eps, alpha * x0 / data + noise * eps, t)
    ours = denoising_error(model.denoiser(), z, cond, PerSample())
    for i in range(3):  # one sigma at a time, as the scheduler has it
        assert isinstance(model.path, EDM)
        sigma = model.path.sigma(t)[i].float()
        x = x0[i : i + 1] + sigma * eps[i : i + 1]
        row = {k: v[i : i + 1] for k, v in cond.items()}
        told = scheduler.precondition_noise(sigma)
        output = model.family.call(model.network, scheduler.precondition_inputs(x, sigma), told[None], row)
        denoised = scheduler.precondition_outputs(x, output, sigma)
        weight = (sigma**2 + data**2) / (sigma * data) ** 2  # lambda(sigma) of table 1
        theirs = weight * ((denoised - x0[i : i + 1]) ** 2).mean()
        assert ours[i].item() == pytest.approx(theirs.item(), rel=1e-3)


def test_latents_have_the_pipelines_scale_over_sigma_data(folder: Path) -> None:
    edm, plain = load(ModelConfig(path=str(folder))), load(ModelConfig(path=str(folder)))
    plain.path = path_from_config({"beta_schedule": "linear"})[0]
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = edm.encode_pixels(pixels)
    for ours, theirs in zip((mean, std), plain.encode_pixels(pixels), strict=True):
        torch.testing.assert_close(ours, theirs / 0.5)
    torch.testing.assert_close(edm.decode(mean), plain.decode(0.5 * mean))
    assert edm.fingerprint != plain.fingerprint  # they must not share a cache


class Knowing:
    """A denoiser that knows the clean latents: v = alpha eps - sigma x0 of the state that it sees."""

    target: Target = "v"

    def __init__(self, path: EDM, x0: torch.Tensor) -> None:
        self.path, self.x0 = path, x0

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in self.path.coefficients(t))
        eps = (x_t - alpha * self.x0) / sigma
        return alpha * eps - sigma * self.x0


def test_a_trajectory_ends_at_what_the_network_knows() -> None:
    x0, noise = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    for eta in (0.0, 1.0):
        draws: Any = torch.Generator().manual_seed(1)
        steps = trajectory(Knowing(EDM(), x0), DDIM(eta), noise, EDM().grid(8), {}, draws)
        assert (steps[-1].x_s - x0).abs().max() < 0.03  # sigma_min / sigma_data = 0.004 of noise is left


@pytest.mark.slow
def test_training_starts_at_log_2_and_the_stock_pipeline_draws(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small(tmp_path / "run", steps=2, model=ModelConfig(path=str(folder), prediction="edm"))
    run = replace(run, validation=replace(run.validation, every=0), data=replace(run.data, limit=8))
    result = align(run, lambda line: None)
    rows = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and losses[0] == pytest.approx(math.log(2), abs=1e-6)
    out = tmp_path / "drawn"
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--height", "32", "--width", "32"]
    assert main(["generate", str(result.output), *words, "--output", str(out)]) == 0
    assert len(list(out.rglob("*.png"))) == 1


def test_training_is_asked_for(folder: Path, tmp_path: Path) -> None:
    run = small(tmp_path / "run", steps=2, model=ModelConfig(path=str(folder)))
    with pytest.raises(UserError, match=r"EDMDPMSolverMultistepScheduler.*c_skip.*allowed: edm"):
        align(run, lambda line: None)
    assert not (tmp_path / "run" / "cache").exists()  # before anything is encoded
    with pytest.raises(UserError, match=r"prediction='edm', but the scheduler of .* allowed with EDMDPM"):
        load(ModelConfig(path="tiny:sd15", prediction="edm"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type.*'sample'.*allowed: epsilon, v_prediction"),
        ({"sigma_schedule": "beta"}, "sigma_schedule.*'beta'.*allowed: exponential, karras"),
        ({"sigma_min": 0.0}, "sigma_min=0.0.*allowed: 0 < sigma_min"),
    ],
)
def test_settings_that_the_preconditioning_lacks_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        path_from_config({**EDMEulerScheduler().config, **changes})


def test_what_no_reader_would_understand_is_refused(folder: Path, tmp_path: Path) -> None:
    model: LoadedModel = load(ModelConfig(path=str(folder)))
    assert prediction_metadata(model) == {}
    with pytest.raises(UserError, match=r"single-file with EDM.*allowed: --to merged"):
        write_single_file(model, tmp_path / "x.safetensors", torch.float32, "x")
