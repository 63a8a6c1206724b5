"""Why there is no group offload of the frozen base by diffusers' hooks: they put away what training needs.

Weights that are offloaded are NaN here, from a group's forward to its next one; on a GPU they would be on the
CPU. A backward that reads them gives NaN, and the adapters of a block go with it, so that the optimizer would
find them apart from their gradients. Where every block is checkpointed gradients are right, but at the end of
the backward all blocks are on the device, so that nothing is saved. Should this test fail with a newer
diffusers, ``docs/decisions.md`` wants another look.
"""

import pytest
import torch
from diffusers.hooks import group_offloading

from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.models.loading import load
from diffalign.models.lora import policy_denoiser, prepare_policy
from tests.models.inputs import conditions, states_of


@pytest.mark.parametrize(
    ("family", "checkpointing", "wrong"),
    [("sdxl", False, True), ("sdxl", True, True), ("sd3", False, True), ("sd3", True, False)],
)
def test_weights_are_away_when_training_reads_them(family, checkpointing, wrong, monkeypatch):
    at_home: dict[torch.nn.Parameter, torch.Tensor] = {}

    def away(group):
        for parameter in [p for module in group.modules for p in module.parameters()] + list(
            group.parameters
        ):
            at_home.setdefault(parameter, parameter.data)
            parameter.data = torch.full_like(parameter.data, float("nan"))

    def back(group):
        for parameter in [p for module in group.modules for p in module.parameters()] + list(
            group.parameters
        ):
            parameter.data = at_home.get(parameter, parameter.data)

    config = ModelConfig(
        path=f"tiny:{family}",
        lora=LoraConfig(rank=2, targets=("to_q",)),
        gradient_checkpointing=checkpointing,
    )
    model = load(config)
    parameters = prepare_policy(model, config)
    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", away)
    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", back)
    group_offloading.apply_group_offloading(
        model.network, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    x, t = states_of(model)
    prediction = policy_denoiser(model, config)(x, t, conditions(model, ["a red circle"] * 2))
    assert at_home and prediction.isfinite().all(), "each forward finds its weights"
    prediction.sum().backward()
    broken = [name for name, p in parameters if p.grad is not None and not p.grad.isfinite().all()]
    assert bool(broken) == wrong, "whether gradients came through weights that were away"
    away_at_the_step = [name for name, p in parameters if p.isnan().any()]
    assert bool(away_at_the_step) == wrong, "whether the optimizer finds adapters beside their gradients"
    if not wrong:  # a recomputation ends before the hook that puts a block away: all are back at once
        assert all(p.isfinite().all() for p in model.network.transformer_blocks.parameters())
