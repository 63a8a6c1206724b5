import math

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffalign.diffusion.likelihood import regression_target
from diffalign.diffusion.paths import RectifiedFlow, VariancePreserving, path_from_config
from diffalign.errors import UserError
from diffalign.types import Noised
from tests.helpers import SD_SCHEDULER, Answers

CONFIGS = {
    "sd": SD_SCHEDULER,
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
    "zero-snr": {**SD_SCHEDULER, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_table_is_the_schedulers_own_bit_for_bit(name):
    scheduler = DDPMScheduler(**CONFIGS[name])
    path, target = path_from_config(scheduler.config)
    assert isinstance(path, VariancePreserving)
    assert torch.equal(path.alphas_cumprod, scheduler.alphas_cumprod)
    assert target == ("v" if name == "zero-snr" else "eps")


def test_every_integer_timestep_finds_its_own_entry():
    path, _ = path_from_config(SD_SCHEDULER)
    for dtype in (torch.float32, torch.float64):
        t = torch.arange(1000).to(dtype) / 1000
        assert torch.equal(path.model_time(t), torch.arange(1000))
    assert path.model_time(torch.tensor([1.0])).item() == 999


@pytest.mark.parametrize("name", CONFIGS)
def test_noising_and_v_target_agree_with_diffusers(name):
    scheduler = DDPMScheduler(**CONFIGS[name])
    path, _ = path_from_config(scheduler.config)
    steps = len(path.alphas_cumprod)
    index = torch.tensor([0, 1, steps // 2, steps - 1])
    t = index / steps
    x0, eps = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in path.coefficients(t))
    torch.testing.assert_close(alpha * x0 + sigma * eps, scheduler.add_noise(x0, eps, index))
    z = Noised(x0, eps, alpha * x0 + sigma * eps, t)
    torch.testing.assert_close(
        regression_target("v", Answers(x0, path), z),
        scheduler.get_velocity(x0, eps, index),
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("scheduler", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])  # of the 5b models and of the 2b
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_cogvideoxs_table_is_its_schedulers_bit_for_bit(scheduler, shift, zero_snr, schedule):
    """And by hand: shifting divides the signal-to-noise ratio a / (1 - a) by the shift."""
    made = scheduler(
        beta_schedule=schedule,
        snr_shift_scale=shift,
        rescale_betas_zero_snr=zero_snr,
        prediction_type="v_prediction",
    )
    path, target = path_from_config(made.config)
    assert target == "v" and torch.equal(path.alphas_cumprod, made.alphas_cumprod)
    if not zero_snr and schedule == "scaled_linear":
        a = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
        table = path.alphas_cumprod.numpy()
        np.testing.assert_allclose(table / (1 - table), a / (1 - a) / shift, rtol=1e-9)


def test_zero_terminal_snr_ends_in_pure_noise():
    path, _ = path_from_config(CONFIGS["zero-snr"])
    alpha, sigma = path.coefficients(torch.tensor([0.999]))
    assert alpha.item() == 0.0 and sigma.item() == 1.0


def test_rectified_flow_from_a_flow_scheduler():
    path, target = path_from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert isinstance(path, RectifiedFlow) and target == "flow"
    t = torch.tensor([0.25])
    assert [c.item() for c in path.coefficients(t)] == [0.75, 0.25]
    assert path.model_time(t).item() == 250.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prediction_type": "epsilom"}, "epsilom.*did you mean epsilon"),
        ({"beta_schedule": "cos"}, "cos.*allowed: linear"),
    ],
)
def test_unknown_names_are_named(change, words):
    with pytest.raises(UserError, match=words):
        path_from_config({**SD_SCHEDULER, **change})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps=0; allowed: 1 to"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps=many"),
        ({"num_train_timesteps": 10**30}, "num_train_timesteps=1000"),
        ({"beta_start": math.nan}, "beta_start=nan; allowed: a number from 0 to 1"),
        ({"beta_end": -1.0}, "beta_end=-1"),
        ({"beta_end": 1.5}, r"betas such as 1\.\d+.*; allowed: 0 to 1"),
        ({"trained_betas": [0.1, math.nan]}, "betas such as nan"),
        ({"trained_betas": []}, "no num_train_timesteps or trained_betas"),
        ({"trained_betas": [0.1] * 10}, "10 trained_betas for num_train_timesteps=1000"),
        ({"trained_betas": [0.0] * 1000}, "betas are all 0"),
        ({"beta_start": 0.0, "beta_end": 0.0}, "betas are all 0"),
        ({"beta_schedule": "nosuch"}, "beta_schedule.*'nosuch'"),
    ],
)
def test_tables_of_betas_that_are_none(changes, message):
    with pytest.raises(UserError, match=message):
        path_from_config({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"invert_sigmas": True}, "invert_sigmas=true, times from data to noise"),
        ({"shift": 0}, "shift=0; allowed: a number above 0"),
        ({"shift": None}, "shift=None; allowed: a number above 0"),
        ({"shift": True}, "shift=True"),
        ({"base_shift": "0.5"}, "base_shift=0.5; allowed: a number"),
        ({"max_image_seq_len": -1}, "max_image_seq_len=-1"),
        ({"max_shift": math.inf}, "max_shift=inf"),
    ],
)
def test_a_flow_that_is_none_is_named(changes, message):
    assert path_from_config({"shift": 3.0, "invert_sigmas": False, "base_shift": -0.5}, 2)[1] == "flow"
    with pytest.raises(UserError, match=message):
        path_from_config({"shift": 3.0, **changes}, 2)
