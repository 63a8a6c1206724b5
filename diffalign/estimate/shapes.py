"""Build a model's networks from their configurations, without weights and without network access."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.models.experts import FIRST
from diffalign.models.families.base import Family, latent_shape
from diffalign.models.families.registry import (
    FAMILIES,
    built_in,
    get_family,
    known_shapes,
    meant,
    moved,
)
from diffalign.models.loading import find_family
from diffalign.models.motion_adapter import motion_config
from diffalign.models.sources import is_single_file, resolve, sniff_family
from diffalign.models.starting import expanded
from diffalign.utils.text import read_json_object


@dataclass(frozen=True)
class Shapes:
    """A family and the configurations of its components, by name."""

    family: Family
    configs: Mapping[str, Mapping[str, Any]]

    def network(self) -> nn.Module:
        """Build the trained network; inside ``torch.device("meta")`` this allocates nothing."""
        import diffusers

        config = dict(self.configs[self.family.network_name])
        cls = getattr(diffusers, config.pop("_class_name", self.family.network_class))
        network: nn.Module = cls.from_config(config)
        return network

    def text_encoder(self, name: str) -> nn.Module:
        """Build a text encoder; inside ``torch.device("meta")`` this allocates nothing."""
        import transformers

        config = dict(self.configs[name])
        if "_class_name" in config:  # a module of diffusers: LTX-2's connectors
            from diffusers.pipelines import ltx2

            module: nn.Module = getattr(ltx2, config.pop("_class_name")).from_config(config)
            return module
        encoder = getattr(transformers, config["architectures"][0], None)
        if encoder is None:  # Kolors' ChatGLM, which is part of diffusers
            from diffusers.pipelines import kolors

            encoder = getattr(kolors, config["architectures"][0])
        read: nn.Module = encoder(encoder.config_class(**config))
        return read

    def encoder_parameters(self) -> int:
        """Return the number of parameters of the VAE and the text encoders together."""
        return sum(p.numel() for module in self.encoders().values() for p in module.parameters())

    def encoders(self) -> dict[str, nn.Module]:
        """Build the VAE and the text encoders on the meta device, by name."""
        import diffusers

        vae = dict(self.configs["vae"])
        cls = getattr(diffusers, vae.pop("_class_name", "AutoencoderKL"))
        with torch.device("meta"):
            modules: dict[str, nn.Module] = {"vae": cls.from_config(vae)}
            for name in (*self.family.text_encoders, *self.family.optional_encoders):
                if name in self.configs:
                    modules[name] = self.text_encoder(name)
        return modules

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Return the latent shape (C, h, w) of an image, or (C, F, h, w) of a video, of a size in pixels."""
        network = self.configs[self.family.network_name]
        return latent_shape(self.family, self.configs["vae"], network, (height, width), frames)

    def cond_shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one sample's conditions for latents of this shape, without the batch axis.

        They include those of a source image if the family's models need one.
        """
        shapes, taken = self.family.cond_shapes(self.configs), self.family.sources
        return shapes if taken is None or not taken.usual else {**shapes, **taken.shapes(latents)}


def shapes_of(config: ModelConfig) -> Shapes:
    """Return the shapes of ``model.path``: read from a folder, or built in for known base models.

    Raises:
        UserError: a hub id with unknown shapes, and ``model.family`` is auto.
    """
    config, known = expanded(config), known_shapes()
    if config.path in known and not os.path.exists(config.path):
        stored = known[config.path]
        name = moved(meant(stored, config.family), config.motion_adapter).name
        if config.family not in ("auto", name):
            raise UserError(f"model.family={config.family!r}, but {config.path!r} is {name}; set auto")
        family = get_family(name).configured(config)
        return _moving(config, Shapes(family, _named(family, built_in(stored.name, config.path))))
    source = resolve(config.path)
    if os.path.isdir(source):
        family = get_family(find_family(config, source).name).configured(config)
        names = [family.network_name, "vae", *family.text_encoders]
        names += [name for name in family.optional_encoders if Path(source, name).is_dir()]
        configs = {name: _read(Path(source, name, "config.json")) for name in names}
        return _moving(config, Shapes(family, configs))
    if is_single_file(source):
        family = get_family(sniff_family(source).name).configured(config)
        return Shapes(family, _named(family, family.configs))
    if config.family == "auto":
        raise UserError(
            f"model.path={config.path!r}: its shapes are not known without downloading it; allowed: a local "
            f"folder, one of {', '.join(known)}, or model.family set to one of {', '.join(FAMILIES)} if it "
            "has that family's usual shapes"
        )
    family = get_family(config.family).configured(config)
    return Shapes(family, _named(family, family.configs))


def _named(family: Family, configs: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """Return built-in configurations with that of the first expert for either, which are alike."""
    return {family.network_name: configs[FIRST], **configs} if FIRST in configs else configs


def _moving(config: ModelConfig, shapes: Shapes) -> Shapes:
    """Return the shapes with ``model.motion_adapter`` in their network."""
    if config.motion_adapter is None:
        return shapes
    name = shapes.family.network_name
    moving = motion_config(shapes.configs[name], config.motion_adapter)
    return replace(shapes, configs={**shapes.configs, name: moving})


def _read(file: Path) -> dict[str, Any]:
    return read_json_object(file)
