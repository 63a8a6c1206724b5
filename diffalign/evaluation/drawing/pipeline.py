"""The digest of a pipeline: samples are named by it, so that those of other weights are never reused."""

import hashlib
import json
from typing import Any, Protocol, runtime_checkable

from torch import nn

from diffalign.models.experts import SECOND
from diffalign.models.families.base import latent_shape
from diffalign.models.families.registry import FAMILIES, get_family
from diffalign.models.loaded import weight_digests


@runtime_checkable
class Pipeline(Protocol):
    """The part of a diffusers pipeline that is used here."""

    @property
    def components(self) -> dict[str, Any]:
        """Networks, scheduler, tokenizers by name."""
        ...

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the pipeline's own progress bar."""
        ...

    def __call__(self, **arguments: Any) -> Any:
        """Something with ``.images``, or ``.frames`` of videos."""
        ...


def modules(pipeline: Pipeline) -> dict[str, nn.Module]:
    """Return the networks of a pipeline by name, in the order of the names."""
    return {name: part for name, part in sorted(pipeline.components.items()) if isinstance(part, nn.Module)}


def check_size(pipeline: Pipeline, height: int | None, width: int | None) -> None:
    """Raise a UserError for sides in pixels that the pipeline's model does not take; None: its own.

    A pipeline of no family that is known here is not checked.
    """
    sides = [side for side in (height, width) if side is not None]
    card = next((one for one in FAMILIES.values() if one.pipeline == type(pipeline).__name__), None)
    if card is None or not sides:
        return
    family, parts = get_family(card.name), pipeline.components
    network = parts.get(family.network_name) or parts[SECOND]  # of two experts the first may be left out
    latent_shape(
        family, parts["vae"].config, network.config, (sides[0], sides[-1]), field="--height, --width"
    )


def fingerprint(pipeline: Pipeline) -> str:
    """Return a short digest of weights and scheduler: equal for equal models, different after a training
    step.

    Of every tensor it takes ``models.loaded.tensor_digest``, not all the bytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part, network in modules(pipeline).items():
        for piece in weight_digests(network, f"{part}."):
            digest.update(piece)
        for name, module in network.named_modules():
            # A flag of peft's layers, a method of networks. Adapters switched off are another model.
            disabled = getattr(module, "disable_adapters", None)
            if isinstance(disabled, bool):
                digest.update(f"{name}{disabled}{module.active_adapters}{module.scaling}".encode())
    scheduler = pipeline.components.get("scheduler")
    if scheduler is not None:
        digest.update(json.dumps(dict(scheduler.config), sort_keys=True, default=str).encode())
    return digest.hexdigest()
