"""Context parallelism: the processes of a group share the tokens of each image or video.

Jacobs et al. 2023 (DeepSpeed-Ulysses), arXiv 2309.14509, by diffusers' ``enable_parallelism``: each process
has a part of the tokens, exchanges them for a part of the heads in each attention, and all have the whole
prediction at the end. A process has the gradient of its own tokens, so the gradient of a row is the sum over
the group (``training.loop``), not the mean.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.models.attention import attentions
from diffalign.models.families.registry import get_family, having
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import find_family
from diffalign.models.precision import only_errors
from diffalign.models.sources import resolve
from diffalign.models.starting import expanded


def check_sharing(config: ModelConfig, degree: int, validates: bool) -> None:
    """Check, before a model is loaded, that the processes of a group can share its tokens.

    Args:
        config: section of the model.
        degree: processes of a group.
        validates: whether its pipeline will draw samples.

    Raises:
        UserError: its family cannot, or its pipeline cuts a prompt to a length that may not be divisible.
    """
    config = expanded(config)
    family = get_family(find_family(config, resolve(config.path)).name)
    if not family.shares_tokens:
        raise UserError(
            f"training.context={degree} with {family.name}, whose tokens cannot be shared by processes; "
            f"allowed: 1, or a model of {', '.join(having('shares_tokens'))}"
        )
    if validates and family.cuts_prompts:
        raise UserError(
            f"validation.every with training.context={degree} and {family.name}, whose pipeline cuts a "
            "prompt to its own number of tokens, which may not be divisible; allowed: 0, "
            "and diffalign generate later"
        )


def check_parts(model: LoadedModel, degree: int, size: tuple[int, int] | None, frames: int | None) -> None:
    """Check that heads and tokens of a loaded model are multiples of the degree.

    Args:
        model: the model.
        degree: processes of a group.
        size: (height, width) in pixels; None: of many sizes, which are checked when they are seen.
        frames: of a video; None for images.

    Raises:
        UserError: they are not; the message has both numbers.
    """
    if degree == 1:
        return
    whom = f"training.context={degree}: {model.family.name}"
    heads = sorted({int(module.heads) for module in attentions(model.network)})
    if odd := [count for count in heads if count % degree]:
        raise UserError(f"{whom} has {odd[0]} attention heads; allowed: a divisor of it, or 1")
    if _splits_text(model.network):
        configs = {model.family.network_name: model.network_config}
        tokens = model.family.cond_shapes(configs)["encoder_hidden_states"][0]
        if tokens % degree:
            raise UserError(
                f"{whom} reads {tokens} tokens of text; allowed: model.max_sequence_length of a multiple of "
                f"{degree}, or another degree"
            )
    if size is None:
        return
    shape, patch = model.latent_shape(*size, frames or 1), model.family.patch(model.network_config)
    count = (shape[1] if len(shape) == 4 else 1) * (shape[-2] // patch) * (shape[-1] // patch)
    if count % degree:
        what = f"{size[0]} x {size[1]} pixels" + (f" in {frames} frames" if model.codec.video else "")
        raise UserError(f"{whom} makes {count} tokens of {what}; allowed: a divisor of it, or another size")


def share_tokens(network: Any, mesh: Any) -> None:
    """Share a network's tokens over the last axis of a mesh, in place.

    Args:
        network: of diffusers, with its adapters, whose layers would otherwise see the tokens of all.
        mesh: of ``training.context.context_mesh``.

    Raises:
        UserError: an attention layer would not exchange tokens, or has a back-end that cannot.
    """
    from diffusers import ContextParallelConfig

    degree = mesh.shape[-1]
    config = ContextParallelConfig(ulysses_degree=degree, mesh=mesh)
    try:
        # it says that this is an experiment, and, of Wan's time, that one number a row is not divided
        with only_errors("diffusers"), _accelerators_counted():
            network.enable_parallelism(config=config)
    except ValueError as error:
        raise UserError(f"training.context={degree}: {' '.join(str(error).split())[:300]}") from error
    alone = [m for m in attentions(network) if getattr(m.processor, "_parallel_config", None) is None]
    if alone:
        raise UserError(
            f"training.context={degree}: {len(alone)} attention layers of {type(network).__name__} "
            f"({type(alone[0].processor).__name__}) would see a part of the tokens only; allowed: 1"
        )
    for name, entry in network._cp_plan.items():
        module = network.get_submodule(name) if "*" not in name else None
        inputs = {key: part.split_dim for key, part in _inputs(entry).items()}
        if module is not None and inputs:
            module.register_forward_pre_hook(_Divisible(inputs, degree), with_kwargs=True)


class _Divisible:
    """A forward pre-hook that checks tensors before diffusers divides them, which asserts without numbers."""

    def __init__(self, axes: Mapping[str, int], degree: int):
        self._axes, self._degree = axes, degree

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [*inspect.signature(type(module).forward).parameters][1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name, axis in self._axes.items():
            value = given.get(name)
            if isinstance(value, torch.Tensor) and value.ndim > axis and value.shape[axis] % self._degree:
                raise UserError(
                    f"training.context={self._degree}: {value.shape[axis]} tokens ({name} of "
                    f"{type(module).__name__}) cannot be divided into {self._degree} parts; allowed: sizes, "
                    "frames and text lengths whose tokens can, or another degree"
                )


def _inputs(entry: Any) -> dict[str, Any]:
    """Return those inputs of a plan's entry that are divided, by name; entries of outputs have none."""
    if not isinstance(entry, Mapping):
        return {}
    return {key: part for key, part in entry.items() if isinstance(key, str) and not part.split_output}


def _splits_text(network: Any) -> bool:
    return any("encoder_hidden_states" in _inputs(entry) for entry in network._cp_plan.values())


@contextmanager
def _accelerators_counted() -> Iterator[None]:
    """Let torch count one accelerator where there is none: diffusers divides a rank by their number."""
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: count() or 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count
