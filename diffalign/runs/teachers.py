"""The teachers of an online run: frozen networks that say where the student's steps should go."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffalign.config.schema import ModelConfig, Run
from diffalign.data.prompts.prompt_sets import read_prompts
from diffalign.errors import UserError
from diffalign.methods import REGISTRY
from diffalign.models.denoisers import NetworkDenoiser
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.rollout.setting import Teachers
from diffalign.types import Denoiser


def check_teachers(run: Run, prompts: Sequence[str]) -> None:
    """Check what can be told of the teachers before a model is loaded.

    Raises:
        UserError: a method of teachers without one, teachers of another method, settings of a run that
            compares, or prompts that not exactly one teacher has.
    """
    config, name = run.rollout, run.method["type"]
    if not REGISTRY[name].taught:
        for place, value, unset in (
            ("teachers", config.teachers, ()), ("reference_guidance", config.reference_guidance, None),
        ):  # fmt: skip
            if value != unset:
                raise UserError(f"rollout.{place}={value!r} with method {name}, which has no teacher")
        return
    if not config.teachers:
        raise UserError(
            f"method {name} learns from a teacher, and rollout.teachers is empty; allowed: a LoRA, a run or "
            "a pipeline folder"
        )
    fixed: tuple[tuple[str, str | int, str | int], ...] = (
        ("rollout.by", config.by, "rewards"),
        ("rollout.combine", config.combine, "sum"),
        ("rollout.shape", config.shape, "trajectories"),
        ("training.reference_every", run.training.reference_every, 0),
    )
    for place, now, allowed in fixed:
        if now not in (allowed, "auto"):
            raise UserError(f"{place}={now!r} with method {name}, which is taught; allowed: {allowed!r}")
    _numbers(config.teachers, prompts)


def teachers_of(
    run: Run, model: LoadedModel, policy: NetworkDenoiser, autocast: torch.dtype | None
) -> tuple[Denoiser, ...]:
    """Return the teachers as denoisers, frozen, on the student's device.

    Args:
        run: whose ``rollout.teachers``.
        model: the student's.
        policy: the student's denoiser, in whose precision they compute.
        autocast: what the student's forward is autocast to, or None.

    Raises:
        UserError: a teacher of another family, or one that predicts something else.
    """
    found: list[Denoiser] = []
    for entry in run.rollout.teachers:
        _, spec = _parts(entry)
        teacher = load(folded(run.model, spec), model.device)
        if (teacher.family.name, teacher.denoiser().target) != (model.family.name, policy.target):
            raise UserError(
                f"rollout.teachers has {spec!r}, a {teacher.family.name} that predicts "
                f"{teacher.denoiser().target}; allowed: a {model.family.name} that predicts {policy.target}"
            )
        network = teacher.network.requires_grad_(False).eval()
        found.append(replace(teacher.denoiser(), network=network, dtype=policy.dtype, autocast=autocast))
    return tuple(found)


def taught_by(run: Run, teachers: tuple[Denoiser, ...]) -> Teachers:
    """Return the teachers with the prompts that each has."""
    entries = run.rollout.teachers

    def who(prompts: Sequence[str]) -> Tensor:
        return torch.tensor(_numbers(entries, prompts))

    return Teachers(teachers, who)


def _numbers(entries: Sequence[str], prompts: Sequence[str]) -> list[int]:
    """Return the number of each prompt's teacher.

    Raises:
        UserError: several teachers without prompts, or prompts that not exactly one of them has.
    """
    named = [_parts(entry) for entry in entries]
    if len(named) == 1 and not named[0][0]:
        return [0] * len(prompts)
    if not all(file for file, _ in named):
        raise UserError(
            f"rollout.teachers={tuple(entries)!r}; allowed: one teacher, or each with a file of its prompts, "
            "such as ocr.txt=runs/ocr"
        )
    theirs = [frozenset(read_prompts(file)) for file, _ in named]
    numbers = []
    for prompt in prompts:
        has = [number for number, own in enumerate(theirs) if prompt in own]
        if len(has) != 1:
            raise UserError(
                f"{len(has)} of rollout.teachers have the prompt {prompt!r}; allowed: exactly one"
            )
        numbers += has
    return numbers


def _parts(entry: str) -> tuple[str, str]:
    """Return (file of prompts or "", teacher)."""
    file, _, spec = entry.rpartition("=")
    return file, spec


def folded(base: ModelConfig, spec: str) -> ModelConfig:
    """Return the model section of what ``spec`` names, adapters in its weights: a pipeline of its own, or a
    LoRA or run on ``base``.
    """
    for folder in (Path(spec), Path(spec, "aligned")):
        if (folder / "model_index.json").is_file():
            return replace(base, path=str(folder), adapter=())
    if spec.startswith("tiny:"):
        return replace(base, path=spec, adapter=())
    return replace(base, adapter=(*base.adapter, spec))
