"""Arithmetic on LoRAs against plain matrices."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign.errors import UserError
from diffalign.export.combine import extracted, mix, reduced, uniform
from diffalign.export.streaming import Entry, write_safetensors
from diffalign.models.lora_formats import Factors, Lora
from diffalign.models.lora_merge import delta, merge, merge_into


def lora(seed: int, rank: int = 3, scale: float = 1.5, magnitude: bool = False) -> Lora:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    mark = normal(6).abs() if magnitude else None
    return {
        "unet": {
            "a": Factors(normal(rank, 5), normal(6, rank), scale, mark),
            "conv": Factors(normal(rank, 5, 3, 3), normal(6, rank, 1, 1), scale, mark),
        }
    }


WEIGHTS = {
    "unet": {
        "a": torch.arange(30.0).reshape(6, 5) / 7,
        "conv": torch.linspace(-1, 1, 270).reshape(6, 5, 3, 3),
    }
}


def test_a_convolution_is_the_same_convolutions_in_a_row() -> None:
    factors = lora(0)["unet"]["conv"]
    x = torch.randn(2, 5, 8, 8)
    twice = torch.conv2d(torch.conv2d(x, factors.down), factors.up) * factors.scale
    torch.testing.assert_close(torch.conv2d(x, factors.product()), twice, atol=1e-4, rtol=1e-4)


def test_a_mixture_is_the_weighted_sum() -> None:
    one, two = lora(1), lora(2, rank=2, scale=0.5)
    for name, factors in mix([(one, 0.25), (two, -2.0)])["unet"].items():
        expected = 0.25 * one["unet"][name].product() - 2 * two["unet"][name].product()
        torch.testing.assert_close(factors.product(), expected)
        assert factors.rank == 5
    with pytest.raises(UserError, match="DoRA"):
        mix([(one, 1.0), (lora(3, magnitude=True), 1.0)])


def test_uniform_changes_no_product() -> None:
    one, two = lora(1), lora(2, rank=2, scale=0.5)
    mixed: Lora = {"unet": {"a": one["unet"]["a"], "conv": two["unet"]["conv"]}}
    same = uniform(mixed)
    assert {(f.rank, f.scale) for f in same["unet"].values()} == {(3, 1.0)}
    for name, factors in same["unet"].items():
        torch.testing.assert_close(factors.product(), mixed["unet"][name].product())


def test_rank_reduction_is_the_truncated_svd_of_the_product() -> None:
    small, error = reduced(lora(4), 2, WEIGHTS)
    lost = whole = 0.0
    for name, factors in lora(4)["unet"].items():
        product = factors.product().double().flatten(1)
        u, s, v = torch.linalg.svd(product, full_matrices=False)
        best = ((u[:, :2] * s[:2]) @ v[:2]).float()
        torch.testing.assert_close(small["unet"][name].product().flatten(1), best, atol=1e-4, rtol=1e-4)
        lost, whole = lost + float(s[2:].square().sum()), whole + float(s.square().sum())
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    assert reduced(lora(4), 3, WEIGHTS)[1] < 1e-6


def test_an_extracted_lora_of_full_rank_is_the_change() -> None:
    change = lora(5)["unet"]
    tuned = {name: WEIGHTS["unet"][name] + change[name].product() for name in change}
    found, error = extracted(
        WEIGHTS["unet"] | {"still": torch.ones(2, 2)}, tuned | {"still": torch.ones(2, 2)}, 3
    )
    assert error < 1e-3 and set(found) == {"a", "conv"}
    for name, factors in found.items():
        torch.testing.assert_close(factors.product(), change[name].product(), atol=1e-4, rtol=1e-3)


def test_a_large_change_is_extracted_by_the_randomised_svd() -> None:
    g = torch.Generator().manual_seed(0)
    change = torch.randn(96, 4, generator=g) @ torch.randn(4, 80, generator=g)
    found, error = extracted({"w": torch.zeros(96, 80)}, {"w": change}, 4)
    assert error < 1e-3
    torch.testing.assert_close(found["w"].product(), change, atol=1e-3, rtol=1e-3)


def test_dora_scales_each_output_to_its_magnitude() -> None:
    for name, factors in lora(6, magnitude=True)["unet"].items():
        weight = WEIGHTS["unet"][name]
        moved = weight + delta(factors, weight)
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), factors.magnitude)
        direction = (weight + factors.product()).flatten(1)
        cosine = torch.cosine_similarity(moved.flatten(1), direction)
        torch.testing.assert_close(cosine, torch.ones(6))


def test_merging_is_linear_in_the_strength_and_blind_to_the_order() -> None:
    one, two = lora(7), lora(8, magnitude=True)

    def merged(*loras: tuple[Lora, float]) -> dict[str, torch.Tensor]:
        weights = {"unet": {k: v.clone() for k, v in WEIGHTS["unet"].items()}}
        merge(weights, loras)
        return weights["unet"]

    both, turned = merged((one, 0.5), (two, 0.25)), merged((two, 0.25), (one, 0.5))
    for name, weight in WEIGHTS["unet"].items():
        expected = weight + 0.5 * delta(one["unet"][name], weight) + 0.25 * delta(two["unet"][name], weight)
        torch.testing.assert_close(both[name], expected)
        torch.testing.assert_close(both[name], turned[name])
        assert torch.equal(merged((two, 0.0))[name], weight)


@pytest.mark.parametrize(
    ("dtype", "strength", "lost", "told"),
    [
        (torch.float32, 1e-4, 0.0, False),
        (torch.bfloat16, 1e-6, 1.0, True),  # below half a step of every weight: nothing is changed
        (torch.bfloat16, 1.0, 0.0, False),
    ],
)
def test_what_rounding_takes_of_a_merged_lora_is_told(
    caplog: pytest.LogCaptureFixture, dtype: torch.dtype, strength: float, lost: float, told: bool
) -> None:
    network = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 6), "conv": torch.nn.Conv2d(5, 6, 3)})
    for module in network.values():
        module.weight.data = torch.linspace(1.0, 2.0, module.weight.numel()).view_as(module.weight).to(dtype)
    before = network["a"].weight.clone()
    model: Any = SimpleNamespace(pipeline=SimpleNamespace(unet=network), source="base", dtype=dtype)
    weights = {"unet": {name: module.weight.detach().clone() for name, module in network.items()}}
    assert merge(weights, [(lora(9), strength)]) == pytest.approx(lost, abs=0.01)
    merge_into(model, [(lora(9), strength)])
    assert ("base: rounding to bfloat16 takes 100 % of the change" in caplog.text) == told
    assert torch.equal(network["a"].weight, before) == told


def test_merging_nothing_loses_nothing() -> None:
    weights = {"unet": {name: weight.clone() for name, weight in WEIGHTS["unet"].items()}}
    assert merge(weights, [(lora(9), 0.0)]) == 0.0


def test_streamed_files_are_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 2).bfloat16(),
        "empty": torch.zeros(0),
        "b": torch.randn(4, 5).t(),
        "scalar": torch.tensor(2.0),
    }
    entries = [Entry(k, tuple(v.shape), v.dtype, lambda v=v: v) for k, v in tensors.items()]  # type: ignore[misc]
    entries.append(Entry("half", (3, 2), torch.float16, lambda: torch.ones(3, 2)))
    size = write_safetensors(tmp_path / "x.safetensors", entries, {"who": "me"})
    assert (tmp_path / "x.safetensors").stat().st_size == size
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == {*tensors, "half"} and found["half"].dtype == torch.float16
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"who": "me"}
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(
            tmp_path / "y.safetensors", [Entry("a", (2,), torch.float32, lambda: torch.ones(3))], {}
        )
    assert not (tmp_path / "y.safetensors").exists()
