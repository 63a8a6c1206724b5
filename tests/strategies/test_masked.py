"""Masked pairs: SimpleTuner's numbers, no change without a map, no gradient outside one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.data.encoding.patches import pool
from diffalign.errors import UserError
from diffalign.methods import REGISTRY, build
from diffalign.methods.auto_beta import AutoBeta
from diffalign.methods.dpo import DPO
from diffalign.strategies import wrap
from diffalign.strategies.anchor import Anchor
from diffalign.strategies.masked import Masked, with_reduce
from diffalign.strategies.sdpo import SDPO
from diffalign.types import Batch
from tests.helpers import VECTORS, Answers, GivenNoise, GivenTimes, sd_path

FILE = VECTORS / "flow_dpo_masked_a.npz"


def cases():
    return sorted({key.rsplit("_mask_image")[0] for key in np.load(FILE) if key.endswith("_mask_image")})


def run(method, model, reference, target, maps, strategies=()):
    """(step, gradient) of pairs, winners first, under the strategies, each around those before it."""
    pairs = len(target) // 2
    inner = replace(method, time=GivenTimes((0.5,) * pairs), noising=GivenNoise(target))
    whole = inner
    for strategy in strategies:
        whole = strategy.wrap(whole)
    policy = model.clone().requires_grad_()
    batch = Batch(
        torch.zeros_like(target),
        {},
        torch.arange(pairs).repeat(2),
        torch.cat([torch.ones(pairs), torch.zeros(pairs)]),
        extra={} if maps is None else {"patches": maps},
    )
    step = whole(Answers(policy, sd_path()), Answers(reference, sd_path()), batch, torch.Generator())
    step.loss.backward()
    return step, policy.grad


@pytest.mark.parametrize("case", cases())
def test_golden_simpletuner(case):
    """Sums are means with a beta D times as large; the anchor after the mask is not masked."""
    f = {key.removeprefix(f"{case}_"): value for key, value in np.load(FILE).items() if key.startswith(case)}
    get = lambda *names: torch.from_numpy(np.concatenate([f[name] for name in names]))  # noqa: E731
    model, reference, target = (get(f"{who}_w", f"{who}_l") for who in ("pred", "ref", "target"))
    elements = model[0].numel()
    scale = elements if str(f["norm"]) == "sum" else 1
    kind, maps, strategies = str(f["mask_type"]), None, ()
    if kind != "None":
        image = torch.from_numpy(f["mask_image"])
        grey = (image[:, 0] if kind == "mask" else image.mean(1)) / 2 + 0.5
        maps = (
            torch.stack([pool(one, f["mask"].shape[-2:]) for one in grey])
            .clamp(0, 1)[:, None]
            .repeat(2, 1, 1, 1)
        )
        reduction = "masked_mean" if str(f["norm"]) == "masked_mean" else "mean"
        strategies = (Masked(reduction, kind, int(f["dilate"])),)
        found = strategies[0].maps(Batch(model, {}, torch.arange(6), torch.zeros(6), extra={"patches": maps}))
        np.testing.assert_allclose(found[:3].numpy(), f["mask"], atol=1e-6)
    method = DPO(beta=float(f["beta"]) * scale)
    if bool(f["auto_beta"]):
        method = AutoBeta(low=1e-3 * scale, high=1.0 * scale)
    step, grad = run(method, model, reference, target, maps, strategies)
    assert step.loss.item() == pytest.approx(float(f["loss"]), rel=1e-5)
    half = len(grad) // 2
    np.testing.assert_allclose(grad[:half].numpy(), f["grad_w"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grad[half:].numpy(), f["grad_l"], rtol=1e-4, atol=1e-6)
    beta = float(step.metrics.get("beta", method.beta if isinstance(method, DPO) else 0)) / scale
    assert beta == pytest.approx(float(f["beta"]), rel=1e-5)
    margin = 2 * step.metrics["rewards/margins"].item() / beta
    assert margin == pytest.approx(f["margin"].mean(), rel=1e-4)
    fresh = AutoBeta(low=1e-3 * scale, high=1.0 * scale) if bool(f["auto_beta"]) else method
    tied, _ = run(fresh, model, reference, target, maps, (*strategies, Anchor(1.0)))
    # SimpleTuner's 1/2 sum of the two means is the mean over both members
    assert tied.metrics["anchor"].item() == pytest.approx(float(f["anchor"]), rel=1e-6)


def given(pairs=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    model, reference, target = 0.1 * torch.randn(3, 2 * pairs, 2, 4, 4, generator=g, dtype=torch.float64)
    return model, reference, target, torch.rand(2 * pairs, 1, 4, 4, generator=g)


OVER_STATES = [
    name for name, card in REGISTRY.items()
    if card.data in ("pairs", "lists", "pairs, with a reward model's scores") and not card.advantages
    and card.rollout == "samples" and name not in ("inpo", "smpo", "inversion_dpo")
]  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "masked_mean"])
@pytest.mark.parametrize("name", OVER_STATES)
def test_maps_of_ones_change_nothing_and_nothing_flows_outside_a_map(name, reduction):
    """With every method of pairs and lists; a batch of maps and rows without one is their mixture."""
    model, reference, target, _ = given()
    ones = torch.ones(6, 1, 4, 4)
    make = lambda: build({"type": name})  # noqa: E731
    plain, grad = run(make(), model, reference, target, None)
    step, got = run(make(), model, reference, target, ones, (Masked(reduction),))
    assert step.loss.item() == plain.loss.item() and torch.equal(got, grad)
    maps = ones.clone()
    maps[..., :2] = 0
    step, got = run(make(), model, reference, target, maps, (Masked(reduction),))
    assert got[..., :2].abs().max() == 0 and got[..., 2:].abs().max() > 0
    assert step.metrics["masked/share"].item() == 0.5


@pytest.mark.parametrize("reduction", ["mean", "masked_mean"])
def test_masked_dpo_by_numpy(reduction):
    model, reference, target, maps = given()
    m, r = (
        (maps.numpy() * (x - target).numpy() ** 2).reshape(6, -1).sum(1)
        / (32 if reduction == "mean" else np.maximum(1, 2 * maps.numpy().reshape(6, -1).sum(1)))
        for x in (model, reference)
    )
    inside = -20 * ((m[:3] - m[3:]) - (r[:3] - r[3:]))
    step, _ = run(DPO(beta=40), model, reference, target, maps, (Masked(reduction),))
    assert step.loss.item() == pytest.approx(np.log1p(np.exp(-inside)).mean(), rel=1e-6)


def test_a_region_grows_by_whole_latents_and_any_share_is_inside_a_segment():
    maps = torch.zeros(1, 1, 5, 5)
    maps[0, 0, 2, 2] = 0.2
    batch = Batch(torch.zeros(1, 2, 5, 5), {}, torch.arange(1), torch.ones(1), extra={"patches": maps})
    assert Masked().maps(batch).sum().item() == pytest.approx(0.2)
    segment = Masked(mask_type="segmentation", dilate=1).maps(batch)
    assert segment[0, 0, 1:4, 1:4].eq(1).all() and segment.sum() == 9
    film = replace(batch, extra={"patches": maps[:, :, None].expand(-1, -1, 3, -1, -1)})
    assert Masked(mask_type="segmentation", dilate=1).maps(film).sum() == 27


def test_the_losers_scale_of_sdpo_sees_masked_gradients_where_the_mask_is_around_it():
    model, reference, target, maps = given()
    step, _ = run(DPO(beta=40), model, reference, target, maps, (SDPO(mu=0.5), Masked()))
    gradient = maps.double() * (model - target)
    won, lost = gradient[:3].flatten(), gradient[3:].flatten()
    cross = (won @ lost).item()
    expected = min(1.0, 0.5 * (won @ won).item() / cross) if cross > 0 else 1.0
    assert step.metrics["sdpo/lambda"].item() == pytest.approx(expected, rel=1e-4)


def test_it_reaches_the_method_inside_other_strategies():
    method = wrap(DPO(), ({"type": "anchor"}, {"type": "sft"}))
    assert with_reduce(method, Masked()).method.method.reduce == Masked()


def test_what_it_refuses():
    model, reference, target, maps = given()
    with pytest.raises(UserError, match="the data has no maps; allowed: rows with a column `mask`"):
        run(DPO(), model, reference, target, None, (Masked(),))
    with pytest.raises(UserError, match=r"maps of shape \(6, 1, 2, 2\) for errors of shape \(6, 2, 4, 4\)"):
        run(DPO(), model, reference, target, maps[..., :2, :2], (Masked(),))
    with pytest.raises(UserError, match="FlowGRPO, which compares no denoising errors"):
        Masked().wrap(build({"type": "flow_grpo"}))
    for bad, word in (({"dilate": -1}, "dilate=-1"), ({"mask_type": "grey"}, "mask_type")):
        with pytest.raises(UserError, match=word):
            wrap(DPO(), ({"type": "masked", **bad},))
