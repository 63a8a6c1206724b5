"""A second network for the negative branch of classifier-free guidance: Diffusion-NPO (Wang et al., ICLR
2025, arXiv 2505.11245; released code).

A model that was trained on flipped preferences has learnt what to avoid, so that the guided prediction is

    eps_neg(x, "") + g ( eps(x, c) - eps_neg(x, "") ).

The negative network may stand on the positive one: its weights are then those of the negative training plus a
share of what the positive one has learnt over the base (``merged_weights``).

Only the stock pipelines that send both branches through the network at once, the negative half first, are
known here: they need no change, since the network itself sends each half its way.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.models.families.registry import FAMILIES


def merged_weights(
    negative: Mapping[str, Tensor],
    positive: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    merge_weight: float,
) -> dict[str, Tensor]:
    """Return negative + (1 - merge_weight) (positive - base) of weights by name, in the negative's dtypes.

    With ``merge_weight`` 0 the negative offset stands on the whole positive model; with 1 on the base alone.

    Raises:
        UserError: three different networks.
    """
    if not negative.keys() == positive.keys() == base.keys():
        raise UserError(
            "the negative branch, the model and its base have weights of different names; allowed: three of "
            "one family"
        )
    share = 1 - merge_weight
    merged = {}
    for name, weight in negative.items():
        offset = positive[name].to(torch.float64) - base[name].to(torch.float64)
        merged[name] = (weight.to(torch.float64) + share * offset).to(weight.dtype)
    return merged


def attach(pipeline: Any, network: nn.Module, negative: nn.Module, family: str) -> None:
    """Send the negative half of each guided call of ``network`` through ``negative``.

    It becomes a submodule of the network, ``negative_branch``, so that it moves with it and counts among its
    weights. Calls without guidance are unchanged.

    Args:
        pipeline: a diffusers pipeline, which knows whether a call is guided.
        network: its network.
        negative: another of the same class.
        family: its name.

    Raises:
        UserError: a pipeline that calls each branch apart, or networks of two kinds.
    """
    fitting = [name for name, card in FAMILIES.items() if card.joined_branches]
    if family not in fitting:
        raise UserError(
            f"a negative branch for {family}, whose pipeline calls each branch of guidance apart; allowed: "
            + ", ".join(fitting)
        )
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if {name: tuple(value.shape) for name, value in negative.state_dict().items()}.keys() - shapes.keys():
        raise UserError("the negative branch is another network than the model's; allowed: one of its family")
    own = network.forward
    network.add_module("negative_branch", negative.requires_grad_(False).eval())

    def forward(sample: Tensor, *args: Any, **named: Any) -> Any:
        rows = len(sample)
        if not pipeline.do_classifier_free_guidance or rows % 2:
            return own(sample, *args, **named)
        answers = []
        for half, call in ((slice(0, rows // 2), negative), (slice(rows // 2, rows), own)):
            cut = _Cut(rows, half)
            further = {name: cut(value) for name, value in named.items()}
            answers.append(call(cut(sample), *map(cut, args), **further))
        low, high = answers
        if isinstance(high, tuple):
            return (torch.cat([low[0], high[0]]), *high[1:])
        return type(high)(sample=torch.cat([low.sample, high.sample]))

    network.forward = _named_first(forward)


class _Cut:
    """Half of the rows of whatever a network is called with."""

    def __init__(self, rows: int, half: slice):
        self._rows, self._half = rows, half

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == self._rows:
            return value[self._half]
        if isinstance(value, Mapping):
            return {name: self(part) for name, part in value.items()}
        return value


def _named_first(forward: Any) -> Any:
    """Return ``forward``, which also takes its states by the name that transformers have for them."""

    def call(*args: Any, **named: Any) -> Any:
        if not args:
            first = "hidden_states" if "hidden_states" in named else "sample"
            args = (named.pop(first),)
        return forward(*args, **named)

    return call
