"""What the speed benchmark trains: arms, and the pipelines that they are trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import speed_mid


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        name: of its rows.
        says: what it is.
        flags: of our run.
        script: arguments of the script that does the same; None: it cannot.
        against: the arm whose script trains the same with what the script has; empty: this one.
        beside: the arm that it differs from in one thing; empty: none.
        unfused: whether torch's optimizer is taken without its fused kernel.
        warm: steps that are not counted.
        visits: how often a pair is seen.
    """

    name: str
    says: str
    flags: tuple[str, ...] = ()
    script: tuple[str, ...] | None = None
    against: str = ""
    beside: str = ""
    unfused: bool = False
    warm: int = 1
    visits: int = 1


ARMS = (
    Arm("lora", "LoRA", script=()),
    Arm(
        "checkpointing",
        "LoRA, gradient checkpointing",
        ("--model.gradient_checkpointing=true",),
        ("--gradient_checkpointing",),
    ),
    Arm("full", "all weights", ("--model.train=full",)),
    Arm(
        "bank",
        "LoRA, `data.reference_bank` 1, once all draws have been asked about",
        ("--data.reference_bank=1",),
        against="lora",
        beside="lora",
        warm=2,
        visits=2,
    ),
    Arm("channels_last", "LoRA, `model.channels_last`", ("--model.channels_last=true",), beside="lora"),
    Arm("prefetch", "LoRA, `data.prefetch` 0", ("--data.prefetch=0",), beside="lora"),
    Arm(
        "unfused",
        "all weights, AdamW without its fused kernel",
        ("--model.train=full",),
        beside="full",
        unfused=True,
    ),
)


@dataclass(frozen=True)
class Subject:
    """A pipeline of SDXL's classes with random weights, and what is trained on it.

    Attributes:
        title: of its part of the page.
        says: what it is.
        different: what its configurations have that SDXL's have not.
        dtype: of its weights, in which both tools compute.
        batch: pairs a step.
        arms: what is trained.
        prefix: of the names of rows.
    """

    title: str
    says: str
    different: Mapping[str, Mapping[str, Any]]
    dtype: str
    batch: int
    arms: tuple[Arm, ...]
    prefix: str


SUBJECTS: Mapping[str, Subject] = {
    "mid": Subject(
        "the mid-size SDXL",
        "The mid-size SDXL (`benchmarks/speed_mid.py`: SDXL's classes, random weights)",
        speed_mid.DIFFERENT,
        "float32",
        2,
        ARMS,
        "speed",
    ),
    "whole": Subject(
        "SDXL at its real size",
        "SDXL at its real size (UNet, both text encoders, autoencoder; random weights)",
        {},
        "bfloat16",
        1,
        tuple(arm for arm in ARMS if arm.name in ("lora", "checkpointing", "bank")),
        "speed-whole",
    ),
}
