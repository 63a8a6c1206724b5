"""Checks that the roles fit a run, before a model is loaded."""

from collections.abc import Sequence
from typing import Any

from diffalign.config.schema import Run
from diffalign.diffusion.noising import Forward
from diffalign.errors import UserError
from diffalign.methods import REGISTRY
from diffalign.methods._multi_time import Stratified
from diffalign.methods.registry import DataKind, shape_of
from diffalign.models.attention import NATIVE
from diffalign.models.context import check_sharing
from diffalign.runs.roles import chase_of, trailing_of
from diffalign.strategies._common import innermost
from diffalign.training.context import check_degree
from diffalign.types import Method
from diffalign.utils.devices import share


def check_roles(run: Run, method: Method[Any]) -> None:
    """Check that the roles fit the run, before a model is loaded.

    Raises:
        UserError: a moving reference for a method without one, or two policies where only one is possible.
    """
    every = run.training.reference_every
    if every and not method.needs_reference:
        raise UserError(
            f"training.reference_every={every}: method {run.method['type']} has no reference; "
            "allowed with it: 0"
        )
    _check_text(run, method)
    _check_sharding(run, method)
    _check_context(run, method)
    _check_quantized(run)
    _check_expert(run, method)
    if run.model.offload_activations:
        _refuse("model.offload_activations=True", (("model.compile", run.model.compile, False),))
    _check_bank(run, method)
    if trailing_of(method) is not None:
        _refuse(
            f"method {run.method['type']}, which a moving average follows",
            (("training.reference_every", every, 0), ("strategies", tuple(run.strategies), ())),
        )
    assisted = bool(REGISTRY[run.method["type"]].assistants)
    if chase_of(method) is None and not assisted:
        return
    _refuse(
        f"method {run.method['type']}, which has assistants" if assisted else "the strategy fast_slow",
        (
            ("model.train", run.model.train, "lora"),
            ("model.gradient_checkpointing", run.model.gradient_checkpointing, False),
            ("training.reference_every", every, 0),
        ),
    )


def _check_sharding(run: Run, method: Method[Any]) -> None:
    """UserError for what a run whose weights are spread does not have: all processes must ask the network
    equally often, and moments and gradients must be spread tensors.
    """
    if run.training.shard == "none":
        return
    whom = f"training.shard={run.training.shard}"
    if not isinstance(method.noising, Forward):
        raise UserError(
            f"{whom} with method {run.method['type']}, whose noisy states take each process another number "
            "of network calls; allowed: training.shard none, or a method that noises forward, such as dpo"
        )
    _one_policy(whom, run, method)
    _refuse(
        whom,
        (
            *_read_once(run),
            ("optimizer.type", run.optimizer.type, "adamw"),
            ("model.compile", run.model.compile, False),
            ("model.offload_activations", run.model.offload_activations, False),
            ("model.lora.dora", run.model.lora.dora, False),
        ),
    )
    if run.training.mixed_precision == "fp16":
        raise UserError(f"training.mixed_precision=fp16 with {whom}; allowed: no, bf16")


def _check_context(run: Run, method: Method[Any]) -> None:
    """UserError for what a run whose processes share tokens does not have: all processes of a group must ask
    the network equally often, with the same numbers.
    """
    if run.training.context == 1:
        return
    whom = f"training.context={run.training.context}"
    if not isinstance(method.noising, Forward) or trailing_of(method) is not None:
        raise UserError(
            f"{whom} with method {run.method['type']}; allowed: training.context 1, or a method that noises "
            "forward and has a reference that no moving average follows, such as dpo"
        )
    _one_policy(whom, run, method)
    _refuse(
        whom,
        (
            *_read_once(run),
            ("training.shard", run.training.shard, "none"),
            ("model.compile", run.model.compile, False),
            ("model.offload_activations", run.model.offload_activations, False),
            ("model.text_encoder.lora.rank", run.model.text_encoder.lora.rank, 0),
            # the parts of a row would have the same masks
            ("model.lora.dropout", run.model.lora.dropout, 0.0),
            ("model.dropout", run.model.dropout, False),
        ),
    )
    attention = NATIVE.get(run.model.attention, run.model.attention)
    if attention not in ("auto", "flash_hub", "_flash_3_hub"):
        raise UserError(
            f"model.attention={run.model.attention!r} with {whom}; allowed: auto, flash_hub, _flash_3_hub"
        )
    check_degree(run.training, share()[1])
    check_sharing(run.model, run.training.context, bool(run.validation.every))


def _one_policy(whom: str, run: Run, method: Method[Any]) -> None:
    """UserError for a second policy or assistants."""
    if chase_of(method) is not None:
        raise UserError(f"{whom} with the strategy fast_slow; allowed: none")
    if REGISTRY[run.method["type"]].assistants:
        raise UserError(f"{whom} with method {run.method['type']}, which has assistants; allowed: none")


def _read_once(run: Run) -> tuple[tuple[str, Any, Any], ...]:
    """Return (name, value, allowed) of what samples or scores on one process while others wait."""
    return (
        ("rollout.prompts", run.rollout.prompts, ""),
        ("validation.rewards", tuple(run.validation.rewards), ()),
    )


def _check_quantized(run: Run) -> None:
    """UserError for what weights of 4 or 8 bits do not have: they cannot be trained or spread."""
    model = run.model
    if model.quantize != "none":
        settings = (
            ("model.train", model.train, "lora"),
            ("model.lora.dora", model.lora.dora, False),
            ("model.compile", model.compile, False),
            ("training.shard", run.training.shard, "none"),
        )
        _refuse(f"model.quantize={model.quantize}", settings)
    if model.text_encoder.quantize != "none":
        whom = f"model.text_encoder.quantize={model.text_encoder.quantize}"
        _refuse(whom, (("model.text_encoder.lora.rank", model.text_encoder.lora.rank, 0),))


def _check_expert(run: Run, method: Method[Any]) -> None:
    """UserError for what one of two experts does not have: states along all times, or a whole pipeline."""
    if run.model.expert is None:
        return
    whom, name = f"model.expert={run.model.expert}", run.method["type"]
    shape = shape_of(name, run.rollout) if run.rollout.prompts else ""
    recorded = shape in ("trajectories", "tree")
    one_time = isinstance(method.noising, Forward) and not isinstance(
        getattr(innermost(method), "time", None), Stratified
    )
    if REGISTRY[name].taught or not (recorded or one_time):
        raise UserError(
            f"{whom} with method {name}, whose noisy states are at other times than the expert's, too; "
            "allowed: a method that noises forward to one time, such as dpo, or that learns from recorded "
            "steps, such as flow_grpo"
        )
    _refuse(whom, (("model.train", run.model.train, "lora"),))
    if shape == "tree":
        raise UserError(f"a tree with {whom}; allowed: rollout.shape trajectories")
    if shape:
        _refuse(whom, (("rollout.window", run.rollout.window, None),))


def _check_bank(run: Run, method: Method[Any]) -> None:
    """UserError where a reference's predictions cannot be kept: it moves, all processes must ask it together,
    or it is asked about other states than the forward noising of pairs.
    """
    if not run.data.reference_bank:
        return
    whom, card = f"data.reference_bank={run.data.reference_bank}", REGISTRY[run.method["type"]]
    kinds = (DataKind.PAIRS, DataKind.REWARDED_PAIRS, DataKind.SCORED_PAIRS)
    if not method.needs_reference or card.data not in kinds or not isinstance(method.noising, Forward):
        raise UserError(
            f"{whom} with method {card.name}; allowed: 0, or a method of pairs that noises forward and has a "
            "reference, such as dpo"
        )
    settings = (
        ("training.reference_every", run.training.reference_every, 0),
        ("training.shard", run.training.shard, "none"),
        ("strategies", tuple(run.strategies), ()),
        ("rollout.prompts", run.rollout.prompts, ""),
        ("data.stream_block", run.data.stream_block, 0),
    )
    _refuse(whom, settings)


def _check_text(run: Run, method: Method[Any]) -> None:
    """Raise a UserError where text encoders are trained and the run is online, or has two sets of adapters or
    none."""
    rank = run.model.text_encoder.lora.rank
    if not rank:
        return
    whom = f"model.text_encoder.lora.rank={rank}"
    settings = (
        ("model.train", run.model.train, "lora"),
        ("training.reference_every", run.training.reference_every, 0),
        ("rollout.prompts", run.rollout.prompts, ""),
    )
    assisted = bool(REGISTRY[run.method["type"]].assistants)
    if trailing_of(method) is not None or assisted:
        why = "which has assistants" if assisted else "which a moving average follows"
        raise UserError(f"{whom} with method {run.method['type']}, {why}; allowed: 0")
    if chase_of(method) is not None:
        raise UserError(f"{whom} with the strategy fast_slow; allowed: 0")
    _refuse(whom, settings)


def _refuse(whom: str, settings: Sequence[tuple[str, Any, Any]]) -> None:
    """Raise a UserError for the first (name, value, allowed) whose value is another one."""
    for name, value, allowed in settings:
        if value != allowed:
            raise UserError(f"{name}={value!r} with {whom}; allowed: {allowed!r}")
