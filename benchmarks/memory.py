"""Measure the peak memory of one training step of the tiny SDXL deterministically, by live tensors."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from diffalign.config.schema import Run
from diffalign.diffusion.randomness import Streams
from diffalign.methods import build
from diffalign.models.loading import load
from diffalign.models.lora import policy_denoiser, prepare_policy, reference_denoiser
from diffalign.types import Batch

PAIRS = 16


class Alive(TorchDispatchMode):
    """Tracks every storage that an operation creates until it is freed; ``peak`` is in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return out

    def _follow(self, tensor: Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):  # quantised: the tensors that it is made of
            for name in tensor.__tensor_flatten__()[0]:
                self._follow(getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def step_memory(run: Run, seed: int = 0) -> dict[str, float]:
    """Return the bytes of the weights, and of all other live tensors at the peak of one step.

    Weights are those of the policy, and of the reference if the method needs one; gradients count as other.
    """
    torch.manual_seed(seed)
    method: Any = build(run.method)
    model = load(run.model)
    prepare_policy(model, run.model, seed)
    policy = policy_denoiser(model, run.model)
    networks = {id(model.network): model.network}
    reference: Any = policy
    if method.needs_reference:
        reference = reference_denoiser(model, policy, run.model)
        if run.model.train == "full":
            networks[id(reference.network)] = reference.network
    texts = ["a small red circle"] * (2 * PAIRS)
    sizes = torch.full((2 * PAIRS, 2), 32.0)
    cond = {**model.encode_prompts(texts), **model.micro_conditions(sizes, 0 * sizes, sizes)}
    x = torch.randn(2 * PAIRS, *model.latent_shape(32, 32))
    group = torch.arange(PAIRS).repeat_interleave(2)
    batch = Batch(x, cond, group, torch.tensor([1.0, 0.0]).repeat(PAIRS))
    with Alive() as alive:
        method(policy, reference, batch, Streams.at(seed, 0, PAIRS)).loss.backward()
    weights = sum(p.numel() * p.element_size() for net in networks.values() for p in net.parameters())
    return {"weights": float(weights), "step": float(alive.peak)}
