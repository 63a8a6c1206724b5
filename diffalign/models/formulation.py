"""The formulation of a model (noising path and prediction), from its scheduler, its file or the run.

A scheduler of a class or with a setting that is not understood is an error, since another formulation would
otherwise train as the default one and end in noise. Single files have theirs in ``modelspec`` metadata
(Stability AI's model metadata standard), as empty tensors called ``v_pred`` and ``ztsnr``, as ComfyUI reads
them, or in a YAML file of the same name beside them, the original repositories' configuration, as A1111 reads
it.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path as PlainPath
from typing import Any, Literal

from diffalign.config.schema import ModelConfig
from diffalign.diffusion.paths import RectifiedFlow, path_from_config
from diffalign.errors import UserError
from diffalign.models.families.card import FamilyCard
from diffalign.models.sources import keys_of
from diffalign.types import Path, Target
from diffalign.utils.notices import main_logger
from diffalign.utils.yaml_reader import read_yaml_file

logger = main_logger(__name__)

BETAS = (
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers of diffusers whose table of betas is that of training."""

FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
"""Schedulers of rectified flows."""

EDMS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
"""Schedulers of EDM's preconditioning."""

ELSEWHERE = {
    "edm_mean": "EDM preconditioning (Playground 2.5), which is read from a diffusers folder alone",
    "edm_vpred.sigma_max": "v-prediction in continuous time (CosXL), which is not trained here",
}
"""Tensors that identify single files of unsupported formulations."""

SCALINGS = {
    "EpsScaling": "epsilon",
    "VScaling": "v_prediction",
    "VScalingWithEDMcNoise": "",
    "EDMScaling": "",
}
"""Scalings of denoisers in configurations of Stability AI's generative-models, by diffusers' names; empty: it
is not trained here."""

MODELSPEC = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""``modelspec.prediction_type`` by diffusers' ``prediction_type``."""


@dataclass(frozen=True)
class Formulation:
    """The differences from the scheduler's own configuration.

    Attributes:
        prediction: diffusers' ``prediction_type``; None: the scheduler's.
        zero_terminal_snr: whether the betas are rescaled (Lin et al. 2023, arXiv 2305.08891, algorithm 1);
            None: as in the scheduler.
        source: its origin, for the message; empty: none.
    """

    prediction: str | None = None
    zero_terminal_snr: bool | None = None
    source: str = ""


def formulation_of_file(file: str, keys: list[str], metadata: Mapping[str, str]) -> Formulation:
    """Return the formulation in a single-file checkpoint.

    Args:
        keys: names of its tensors.
        metadata: of a safetensors file.

    Raises:
        UserError: one that is not read from a file, a ``modelspec.prediction_type`` that is not known, or
            a configuration beside it that says otherwise.
    """
    for key, title in ELSEWHERE.items():
        if key in keys:
            raise UserError(
                f"model.path={file!r} has the tensor {key}: {title}; allowed: "
                "single files of models of a table of betas, or of rectified flow"
            )
    prediction, sources = None, []
    named = metadata.get("modelspec.prediction_type", "").strip().lower()
    if named:
        if named not in MODELSPEC:
            raise UserError(
                f"model.path={file!r}: modelspec.prediction_type={named!r} is not known; allowed: "
                f"{', '.join(MODELSPEC)}"
            )
        prediction = MODELSPEC[named]
        sources.append(f"modelspec.prediction_type={named}")
    if "v_pred" in keys:
        prediction = "v_prediction"
        sources.append("the tensor v_pred")
    beside = next((p for p in map(PlainPath(file).with_suffix, (".yaml", ".yml")) if p.is_file()), None)
    configured = None if beside is None else _prediction_of_yaml(beside)
    if beside is not None and configured is not None:
        if prediction is not None and configured != prediction:
            raise UserError(
                f"model.path={file!r} predicts {prediction} by {', '.join(sources)}, and {configured} by "
                f"{beside}; allowed: one of them, or model.prediction with that file moved elsewhere"
            )
        prediction = configured
        sources.append(str(beside))
    zero = True if "ztsnr" in keys else None
    if zero:
        sources.append("the tensor ztsnr")
    return Formulation(prediction, zero, ", ".join(sources))


def formulation_in(config: ModelConfig, file: str, card: FamilyCard) -> Formulation:
    """Return the formulation of a single file.

    Raises:
        UserError: it is not said, and files of this family have several.
    """
    formulation = formulation_of_file(file, *keys_of(file))
    if card.predictions and formulation.prediction is None and config.prediction == "auto":
        raise UserError(
            f"model.path={config.path!r} does not say what it predicts, and single files of {card.title} "
            f"have several predictions: {card.predictions}; set model.prediction"
        )
    return formulation


def _prediction_of_yaml(file: PlainPath) -> str | None:
    """Return the prediction in the configuration beside a single file; None where it has none.

    Raises:
        UserError: no YAML, or a parametrisation that is not known or not trained here.
    """
    content: Any = read_yaml_file(file)
    for name in ("model", "params"):
        content = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping):
        return None
    if (parametrisation := content.get("parameterization")) is not None:
        if parametrisation not in ("eps", "v", "x0"):
            raise UserError(f"{file}: parameterization is {str(parametrisation)[:40]!r}; allowed: eps, v, x0")
        return {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[parametrisation]
    for name in ("denoiser_config", "params", "scaling_config", "target"):
        content = content.get(name) if isinstance(content, Mapping) else None
    scaling = str(content or "").rpartition(".")[2]
    if scaling and not SCALINGS.get(scaling):
        raise UserError(
            f"{file}: the denoiser's {scaling} is not trained here; allowed: EpsScaling, VScaling"
        )
    return SCALINGS.get(scaling)


def set_formulation(pipeline: Any, config: ModelConfig, formulation: Formulation) -> None:
    """Give the pipeline a scheduler of its file's or the run's formulation, and log it once.

    ``model.prediction`` and ``model.zero_terminal_snr`` overrule the file, which overrules the scheduler.

    Raises:
        UserError: a setting that the model's path does not have.
    """
    scheduler = pipeline.scheduler
    if config.prediction == "edm":
        if type(scheduler).__name__ not in EDMS:
            raise UserError(
                f"model.prediction='edm', but the scheduler of {config.path!r} is "
                f"{type(scheduler).__name__}; allowed with {', '.join(EDMS)}"
            )
        return
    prediction = formulation.prediction if config.prediction == "auto" else config.prediction
    zero = formulation.zero_terminal_snr if config.zero_terminal_snr is None else config.zero_terminal_snr
    changes: dict[str, Any] = {}
    if prediction is not None and prediction != scheduler.config.get("prediction_type"):
        changes["prediction_type"] = prediction
    if zero is not None and zero != scheduler.config.get("rescale_betas_zero_snr", False):
        changes["rescale_betas_zero_snr"] = zero
    if formulation.source:
        logger.warning(
            "%s: recognised by %s: prediction %s, zero terminal SNR %s",
            config.path,
            formulation.source,
            prediction or scheduler.config.get("prediction_type"),
            bool(zero),
        )
    if not changes:
        return
    if type(scheduler).__name__ not in BETAS or isinstance(
        path_from_config(scheduler.config)[0], RectifiedFlow
    ):
        raise UserError(
            f"model.prediction={config.prediction!r}, model.zero_terminal_snr={config.zero_terminal_snr!r} "
            f"with {type(scheduler).__name__} of {config.path!r}, whose path has no such choice; allowed: "
            "auto and null"
        )
    pipeline.scheduler = _with(scheduler, changes)


def check_trained(config: ModelConfig, scheduler: Any) -> None:
    """Check that a run says so where its model is one of EDM's preconditioning.

    It has to: no preference method was published for such a model, so that its weights of noise levels are
    those of the other models carried over.

    Raises:
        UserError: it does not.
    """
    name = type(scheduler).__name__
    if name in EDMS and config.prediction != "edm":
        raise UserError(
            f"model.path={config.path!r} has the scheduler {name}: EDM's preconditioning (c_in, c_skip, "
            "c_out, c_noise), for which no preference method was published; "
            f"model.prediction={config.prediction!r}, allowed: edm, which trains it with the objective of "
            "the other models"
        )


def _with(scheduler: Any, changes: Mapping[str, Any]) -> Any:
    """Return the scheduler with other settings; a DDIM scheduler if its class does not have them."""
    known = inspect.signature(type(scheduler).__init__).parameters
    if all(name in known for name in changes):
        return type(scheduler).from_config(scheduler.config, **changes)
    from diffusers import DDIMScheduler

    trailing = {"timestep_spacing": "trailing"} if changes.get("rescale_betas_zero_snr") else {}
    logger.warning(
        "%s has no %s: DDIMScheduler takes its place", type(scheduler).__name__, ", ".join(changes)
    )
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, **changes, **trailing)


def path_of(
    scheduler: Any, patch: int | None, path: str, keeps_length: Literal["token", "row"] | None = None
) -> tuple[Path, Target]:
    """Return the noising path and the prediction of a diffusers scheduler.

    Args:
        patch: see ``path_from_config``.
        path: ``model.path``, for messages.
        keeps_length: which parts of a flow's guided prediction are as long as the prompt's.

    Raises:
        UserError: a scheduler of a class or with a setting that is not understood.
    """
    name = type(scheduler).__name__
    if name not in (*BETAS, *FLOWS, *EDMS):
        raise UserError(
            f"model.path={path!r} has the scheduler {name}, whose noising path is not trained here; allowed: "
            f"{', '.join((*BETAS, *FLOWS, *EDMS))}"
        )
    try:
        noising, target = path_from_config(scheduler.config, patch)
    except UserError as error:
        raise UserError(f"model.path={path!r}, its scheduler {name}: {error}") from error
    if keeps_length and isinstance(noising, RectifiedFlow):
        rows = keeps_length == "row"
        noising = replace(noising, guided_patch=None if rows else patch, guided_rows=rows)
    return noising, target
