"""FLOPs by shape: attention costs the same whichever kernel torch picks for it."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign.config.schema import DataConfig, ModelConfig, Run
from diffalign.estimate.estimate import estimate
from diffalign.estimate.flops import AsOnGpu, Flops, attention_flops
from diffalign.runs.micro_batch import workload_of

FORWARD = 2 * (2 * 3) * 5 * 7 * (8 + 8)
"""Scores and their product with value: 2 per multiply-add, batch 2, 3 heads, 5 queries, 7 keys, width 8."""


def qkv(**named: object) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(2, 3, n, 8, requires_grad=True, **named) for n in (5, 7, 7))  # type: ignore[call-overload]


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_cpu(backend: SDPBackend, masked: bool) -> None:
    mask = torch.zeros(2, 1, 5, 7) if masked else None
    with sdpa_kernel(backend), Flops() as forward:
        out = F.scaled_dot_product_attention(*qkv(), attn_mask=mask)
    with Flops() as backward:
        out.sum().backward()
    assert forward.total == FORWARD
    # a fused kernel computes the scores again: 5 products; stored scores leave 4
    assert backward.total == FORWARD * (2.5 if backend == SDPBackend.FLASH_ATTENTION else 2)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_attention_of_any_device(device: str) -> None:
    """On fake tensors, where neither the device nor a kernel of it is needed."""
    with FakeTensorMode(), Flops() as flops:
        F.scaled_dot_product_attention(*qkv(device=device, dtype=torch.bfloat16))
    assert flops.total == FORWARD


def test_every_fused_operator_is_counted() -> None:
    """Called by name, each overload that this torch has, on meta."""
    aten, q = torch.ops.aten, [x.to("meta") for x in qkv()]
    calls = {
        "_scaled_dot_product_flash_attention": (*q,),
        "_scaled_dot_product_flash_attention_for_cpu": (*q,),
        "_scaled_dot_product_efficient_attention": (*q, None, True),
        "_scaled_dot_product_cudnn_attention": (*q, None, True),
    }
    for name, args in calls.items():
        with torch.no_grad(), Flops() as flops:
            getattr(aten, name)(*args)
        assert flops.total == FORWARD, name


def test_widths_of_keys_and_values_may_differ() -> None:
    assert attention_flops((4, 2, 10, 8), (4, 2, 6, 8), (4, 2, 6, 3)) == 2 * 8 * 10 * 6 * (8 + 3)
    assert attention_flops((4, 2, 10, 8), (4, 1, 6, 8), (4, 1, 6, 3)) == 2 * 8 * 10 * 6 * (8 + 3)


def test_products_and_convolutions() -> None:
    layer = torch.nn.Conv2d(3, 4, 3, padding=1)
    with Flops() as flops:
        out = layer(torch.zeros(2, 3, 8, 8)).flatten(1) @ torch.zeros(256, 5)
    assert flops.total == 2 * 2 * 64 * 4 * 27 + 2 * 2 * 256 * 5
    with Flops() as backward:
        out.sum().backward()
    assert backward.total == 2 * 2 * 64 * 4 * 27 + 2 * 2 * 256 * 5  # the weight's, and the left operand's


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_attention_and_autocast_of_a_gpu_on_meta(autocast: torch.dtype | None) -> None:
    """One fused kernel, and products in the precision of autocast; a norm gives float32 back."""
    layer, norm = torch.nn.Linear(8, 8, device="meta"), torch.nn.LayerNorm(8, device="meta")
    with Flops() as flops, AsOnGpu(autocast):
        q, k, v = (layer(x.to("meta")) for x in qkv())
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(2, 1, 5, 7, device="meta"))
    assert out.dtype == (autocast or torch.float32)
    assert out.grad_fn is not None and "flash" in type(out.grad_fn).__name__.lower()
    assert flops.total == FORWARD + 2 * (2 * 3) * (5 + 7 + 7) * 8 * 8
    with AsOnGpu(autocast):
        assert norm(out.to(torch.bfloat16) if autocast else out).dtype == torch.float32


def test_attention_of_a_long_video() -> None:
    """Wan 2.1 1.3B at 480 x 832 and 81 frames: 30 blocks of width 1536, 32,760 tokens, 512 of text."""
    run = Run(
        model=ModelConfig(path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", dtype="bfloat16"),
        data=DataConfig(height=480, width=832, frames=81),
    )
    tokens, text, width = 21 * 30 * 52, 512, 1536
    attention = 30 * 4 * width * tokens * (tokens + text)
    linear = 30 * 2 * tokens * (6 * width**2 + 2 * width * 8960) + 30 * 2 * text * 2 * width**2
    forward = estimate(workload_of(run)).forward_flops
    assert forward == pytest.approx(attention + linear, rel=0.01)
    assert attention > 0.6 * forward
