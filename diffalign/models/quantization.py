"""Frozen weights in 4 or 8 bits: the base under LoRA, and text encoders while a cache is filled.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314. ``nf4`` (4-bit normal floats with quantised scales, blocks of
64) and ``int8`` (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339, activations of 6 and more apart) are
bitsandbytes'; ``torchao_int8`` and ``torchao_float8`` are torchao's weight-only types, one scale an output
channel. Only the linear layers of repeated blocks are quantised: they are most of a network, and what stands
before and after them is small and sensitive. Adapters stay float32, and policy and reference compute with the
same quantised weights, so that they are equal before the first step.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError, unknown
from diffalign.training.packages import OF_QUANTIZED, missing

_BLOCK, _SCALES = 64, 256  # nf4: weights of a scale; scales, in 8 bits, of a second one


def quantize(module: Any, kind: str, device: torch.device | str, compute: torch.dtype, where: str) -> int:
    """Quantise the linear layers of a module's blocks in place, and put the whole of it on ``device``.

    Args:
        module: a network of diffusers or a text encoder of transformers, unquantised and frozen.
        kind: one of ``KINDS``.
        device: where it goes; quantised there, a layer at a time.
        compute: dtype that layers of 4 bits compute in.
        where: the setting, for messages.

    Returns:
        How many weights are quantised.

    Raises:
        UserError: an unknown kind, a package that is not installed, or a module without layers to quantise.
    """
    if kind not in KINDS:
        raise unknown(where, kind, ["none", *KINDS])
    layers = dict(quantizable(module, kind))
    if not layers:
        raise UserError(f"{where}={kind}: {type(module).__name__} has no layers to quantise; allowed: none")
    count = sum(layer.weight.numel() for layer in layers.values())
    try:
        _QUANTIZERS[kind](module, layers, kind, device, compute)
    except ImportError as error:
        raise missing(f"{where}={kind}", OF_QUANTIZED[kind]) from error
    module.to(device)
    return count


def quantizable(module: nn.Module, kind: str) -> Iterator[tuple[str, nn.Linear]]:
    """Yield names and linear layers inside the blocks that a network repeats, by its own list of classes.

    Of a text encoder these are the blocks that may not be split over devices. ``nf4`` leaves out layers whose
    rows are no whole number of its blocks of 64: bitsandbytes reads their scales wrongly on CPUs with AVX512.
    """
    columns = _BLOCK if kind == "nf4" else 1
    blocks = set(
        getattr(module, "_repeated_blocks", None) or getattr(module, "_no_split_modules", None) or ()
    )
    for name, block in module.named_modules():
        if type(block).__name__ in blocks:
            for inner, layer in block.named_modules():
                if isinstance(layer, nn.Linear) and layer.in_features % columns == 0:
                    yield f"{name}.{inner}", layer


def stored_bytes(layer: nn.Linear, kind: str) -> int:
    """Return the bytes that the weight of a layer takes in a kind, its scales included."""
    n, rows = layer.weight.numel(), layer.weight.shape[0]
    if kind == "nf4":
        scales = -(-n // _BLOCK)
        return -(-n // 2) + scales + 4 * -(-scales // _SCALES)
    return n + rows * {"int8": 4, "torchao_int8": layer.weight.element_size(), "torchao_float8": 4}[kind]


def _with_bitsandbytes(
    module: nn.Module, layers: dict[str, nn.Linear], kind: str, device: Any, compute: torch.dtype
) -> None:
    import bitsandbytes

    modules: Any = bitsandbytes.nn

    for name, layer in layers.items():
        weight, bias = layer.weight.data, layer.bias
        with torch.device("meta"):
            new: Any = (
                modules.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias is not None,
                    compute_dtype=compute,
                    quant_type="nf4",
                )
                if kind == "nf4"
                else modules.Linear8bitLt(
                    layer.in_features,
                    layer.out_features,
                    bias is not None,
                    has_fp16_weights=False,
                    threshold=6.0,
                )
            )
        if kind == "nf4":
            # Else a CPU with AVX512-BF16 repacks the weight for good in the first forward without gradients,
            # and the product with packed weights has no backward.
            new.support_avx512bf16_for_cpu = False
            new.weight = modules.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)
        else:
            new.weight = modules.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = bias
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, new.to(device).requires_grad_(False))
        layer.weight = None  # type: ignore[assignment]  # the whole one goes before the next is made


class Dequantized(nn.Linear):
    """A frozen linear layer whose quantised weight is made whole in forward and again in backward.

    Left to autograd, torchao's types keep the whole weight of every layer from the one to the other.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input weight^T + bias``."""
        out: Tensor = _Product.apply(input, self.weight, self.bias)
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(
            x, weight.dequantize().to(x.dtype), bias if bias is None else bias.to(x.dtype)
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight.dequantize().to(gradient.dtype), None, None


def _with_torchao(
    module: nn.Module, layers: dict[str, nn.Linear], kind: str, device: Any, compute: torch.dtype
) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    chosen = set(layers.values())
    config = Int8WeightOnlyConfig() if kind == "torchao_int8" else Float8WeightOnlyConfig()
    quantize_(module, config, filter_fn=lambda layer, name: layer in chosen, device=device)
    for layer in chosen:
        layer.__class__ = Dequantized


_QUANTIZERS = {
    "nf4": _with_bitsandbytes,
    "int8": _with_bitsandbytes,
    "torchao_int8": _with_torchao,
    "torchao_float8": _with_torchao,
}
KINDS = tuple(_QUANTIZERS)
