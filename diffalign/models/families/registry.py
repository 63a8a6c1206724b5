"""The model families that diffalign knows, without importing torch: what `diffalign models` lists.

A family is one module that encodes prompts and calls the network. Everything else (loading, adapters,
attention, export) is common to all families and does not depend on their names.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError, unknown
from diffalign.models.families.card import FamilyCard
from diffalign.models.families.image_cards import IMAGES
from diffalign.models.families.video_cards import VIDEOS

if TYPE_CHECKING:
    from diffalign.models.families.base import Family


_CARDS = sorted((*IMAGES, *VIDEOS), key=lambda card: card.name)

FAMILIES: Mapping[str, FamilyCard] = {card.name: card for card in _CARDS}

REFUSED: Mapping[str, str] = {
    "LTXConditionPipeline": "LTX-Video 0.9.5 and later, with conditions at any frame: its sampler adds fresh "
    "noise to a given frame before every call of the network, so no prediction is a function of the state "
    "and the source alone; its frames have other positions in time, and it has a schedule of its own",
}
"""Pipelines that resemble a family's and are none, and why."""


def get_family(name: str) -> "Family":
    """Return the family of that name; imports torch.

    Raises:
        UserError: there is none.
    """
    if name not in FAMILIES:
        raise unknown("model family (model.family)", name, [*FAMILIES, "auto"])
    family: Family = _at(FAMILIES[name].target)
    return family


def laid_out_as(layout: str) -> list[str]:
    """Return the names of the families whose LoRAs other programs read in a layout."""
    return [name for name, card in FAMILIES.items() if card.files.layout == layout]


def having(trait: str) -> list[str]:
    """Return the names of the families whose attribute ``trait`` is true; imports torch and all families."""
    return [name for name in FAMILIES if getattr(get_family(name), trait)]


def moved(card: FamilyCard, adapter: str | None) -> FamilyCard:
    """Return the card of the family that ``model.motion_adapter`` makes of one; itself without an adapter.

    Raises:
        UserError: no motion adapter fits models of that family.
    """
    if adapter is None:
        return card
    found = [other for other in FAMILIES.values() if other.moves == card.name]
    if not found:
        fitting = ", ".join(other.moves for other in FAMILIES.values() if other.moves)
        raise UserError(
            f"model.motion_adapter={adapter!r} with a model of {card.name} ({card.title}); allowed: null, or "
            f"a model of {fitting}"
        )
    return found[0]


def meant(card: FamilyCard, family: str) -> FamilyCard:
    """Return the card of ``model.family`` where its weights are stored as ``card``'s; else ``card``."""
    named = FAMILIES.get(family)
    return named if named is not None and card.pipeline in named.stored_as else card


def known_shapes() -> dict[str, FamilyCard]:
    """Return the cards by the hub ids of networks whose shapes are built in."""
    return {
        hub_id: card
        for card in FAMILIES.values()
        for hub_id in (*card.same_shapes, *(other for other, _ in card.other_shapes))
    }


def built_in(name: str, hub_id: str | None = None) -> Mapping[str, Mapping[str, Any]]:
    """Return the configurations of a family's components, of the base model or of one of another shape."""
    differing = dict(FAMILIES[name].other_shapes).get(hub_id or "")
    configs = {**get_family(name).configs, **(_at(differing) if differing else {})}
    return {component: config for component, config in configs.items() if config is not None}


def _at(target: str) -> Any:
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)
