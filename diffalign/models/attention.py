"""Attention back-ends whose effect is verified.

Diffusers' ``set_attention_backend`` does not reach the UNet processors, which call
scaled_dot_product_attention directly. So each processor is wrapped: its call runs inside
``torch.nn.attention.sdpa_kernel`` with one back-end allowed. This also covers the recomputation of a
checkpointed block, which does not call the network's own forward; the backward is that of the forward's
kernel. A back-end that cannot run is an error: there is no silent fallback.

FlashAttention 2 and 3 as packages or as kernels of the hub are diffusers' own back-ends, set by
``set_attention_backend`` on networks whose processors call its dispatcher.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.errors import UserError, unknown
from diffalign.models.families.base import Family
from diffalign.models.precision import only_errors

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
NATIVE = {"native": "auto", **{f"_native_{name}": name for name in BACKENDS}}
"""Names here of diffusers' names of torch's back-ends."""

DISPATCHED = {"flash_hub": "kernels", "_flash_3": "flash_attn_interface", "_flash_3_hub": "kernels"}
"""Back-ends of diffusers' dispatcher that have a backward, and the module that each needs.

None takes a mask.
"""


@dataclass(frozen=True)
class OneBackend:
    """An attention processor that allows one back-end around another processor."""

    processor: Any
    backend: SDPBackend

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        *others: Any,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
        rotary_emb: Any = None,
        freqs_cis: Any = None,
        **named: Any,
    ) -> Any:
        """Return the wrapped processor's result: a tensor, or two in joint attention of image and text.

        The optional arguments are listed because diffusers inspects the signature and drops others; they are
        passed on only if given, since no processor takes them all.

        Raises:
            UserError: the back-end does not support this call, such as a mask with flash on a GPU.
        """
        optional = {
            "temb": temb,
            "image_rotary_emb": image_rotary_emb,
            "rotary_emb": rotary_emb,
            "freqs_cis": freqs_cis,
        }
        named |= {name: value for name, value in optional.items() if value is not None}
        try:
            with sdpa_kernel(self.backend):
                return self.processor(attn, hidden_states, *others, **named)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise UserError(
                f"model.attention: {self.backend.name.lower()} cannot run the attention of this network, "
                "such as one with a mask; allowed here: auto"
            ) from error


def check_masks(name: str, family: Family) -> None:
    """Check, before a model is loaded, that its back-end takes the masks that its family passes.

    Raises:
        UserError: FlashAttention of diffusers' dispatcher, which takes none.
    """
    if name in DISPATCHED and family.masks_attention:
        raise UserError(
            f"model.attention={name!r} with {family.name}, whose attention has a mask, which FlashAttention "
            "does not take; allowed: auto, efficient, cudnn, math"
        )


def set_attention(network: Any, name: str, device: torch.device | str, dtype: torch.dtype) -> None:
    """Restrict the attention of ``network`` to the back-end ``name``; ``auto`` leaves the choice to torch.

    ``name`` is one of here, or diffusers' name of it.

    Args:
        device: where the network runs.
        dtype: of its computation: autocast's, if there is autocast.

    Raises:
        UserError: an unknown name, or a back-end that cannot run there; the message lists those that can.
    """
    name = NATIVE.get(name, name)
    if name == "auto":
        return
    if name != "xformers" and name not in (*BACKENDS, *DISPATCHED):
        allowed = ["auto", "xformers", *BACKENDS, *DISPATCHED, *NATIVE]
        raise unknown("attention (model.attention)", name, allowed)
    dims = head_dims(network)
    if name in DISPATCHED:
        _dispatch(network, name, device, dtype, dims)
        return
    if name == "xformers":
        try:
            network.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(_unavailable(name, device, dtype, dims, str(error))) from error
        return
    reasons = [r for dim in dims if (r := why_not(name, device, dtype, dim))]
    if reasons:
        raise UserError(_unavailable(name, device, dtype, dims, reasons[0]))
    for module in attentions(network):
        module.set_processor(OneBackend(module.processor, BACKENDS[name]))


def _dispatch(
    network: Any, name: str, device: torch.device | str, dtype: torch.dtype, dims: list[int]
) -> None:
    """Set a back-end of diffusers' dispatcher on one network, after a trial of it forward and backward.

    Raises:
        UserError: the package is missing, the network does not call the dispatcher, or the trial fails.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    modules = attentions(network)
    without = [m for m in modules if not hasattr(m.processor, "_attention_backend")]
    if without or not modules:
        here = ", ".join(["auto", *available(device, dtype, dims)])
        raise UserError(
            f"model.attention={name!r}: {len(without)} of {len(modules)} attention layers of "
            f"{type(network).__name__} do not call diffusers' dispatcher; allowed here: {here}"
        )
    package = DISPATCHED[name]
    if find_spec(package) is None:
        from_where = "pip install kernels" if package == "kernels" else "build FlashAttention 3 from source"
        raise UserError(f"model.attention={name!r} needs {package}, which is not installed: {from_where}")
    active, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        with only_errors("diffusers"):  # it says that the back-ends are an experiment
            network.set_attention_backend(name)
        for dim in dims:
            _try_dispatched(name, device, dtype, dim)
    except Exception as error:  # of a download, of another package's version, of the device, of the kernel
        raise UserError(_unavailable(name, device, dtype, dims, str(error))) from error
    finally:
        # set_attention_backend also makes it the default of all other networks, such as autoencoders
        _AttentionBackendRegistry.set_active_backend(active)


def _try_dispatched(name: str, device: torch.device | str, dtype: torch.dtype, dim: int) -> None:
    """Run a back-end of diffusers' dispatcher forward and backward on zeros of shape (1, 16, 2, dim)."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    q, k, v = (torch.zeros(1, 16, 2, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    dispatch_attention_fn(q, k, v, backend=AttentionBackendName(name)).sum().backward()


def head_dims(network: nn.Module) -> list[int]:
    """Widths of the attention heads in ``network``, sorted."""
    return sorted({_head_dim(m) for m in attentions(network)})


def _head_dim(attention: Any) -> int:
    """Return the width of a head: of some classes only the number of heads is kept."""
    if hasattr(attention, "inner_dim"):
        return int(attention.inner_dim // attention.heads)
    query = attention.to_q if hasattr(attention, "to_q") else attention.to_query
    return int(query.out_features // attention.num_heads)


def attentions(network: nn.Module) -> list[Any]:
    """Return the attention layers of a network."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    kinds = (Attention, AttentionModuleMixin)
    return [module for module in network.modules() if isinstance(module, kinds)]


def available(device: torch.device | str, dtype: torch.dtype, dims: Iterable[int]) -> list[str]:
    """Return the back-ends that run forward and backward on the device for all head widths."""
    dims = list(dims)
    return [name for name in BACKENDS if not any(why_not(name, device, dtype, dim) for dim in dims)]


def why_not(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why a back-end cannot run, or None: it is run, and the kernel that torch called is checked."""
    q, k, v = (
        torch.zeros(1, 2, 16, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    try:
        with Calls() as calls, sdpa_kernel(BACKENDS[name]):
            F.scaled_dot_product_attention(q, k, v).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0][:160]
    if kernel_of(calls.names) != name:
        return f"torch ran {kernel_of(calls.names)} instead"
    return None


class Calls(TorchDispatchMode):
    """Records the names of the operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the operator and run it."""
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def kernel_of(names: Iterable[str]) -> str:
    """Return the back-end that a list of operator names shows: a fused kernel, or else math."""
    for name in names:
        for backend in ("flash", "efficient", "cudnn"):
            if f"scaled_dot_product_{backend}_attention" in name:
                return backend
    return "math"


def _unavailable(name: str, device: torch.device | str, dtype: torch.dtype, dims: list[int], why: str) -> str:
    here = ", ".join(["auto", *available(device, dtype, dims)])
    return (
        f"model.attention={name!r} cannot run on {torch.device(device).type} in "
        f"{str(dtype).removeprefix('torch.')} with heads of {', '.join(map(str, dims))}: "
        f"{' '.join(why.split())[:200]}; allowed here: {here}"
    )
