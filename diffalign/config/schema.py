"""The configuration of a run: a tree of frozen dataclasses, which alone define the defaults.

A YAML file sets values, dotted flags (``--model.lora.rank 32``) override them, and the resolved tree is
written to ``config.yaml`` in the run directory, from which it loads again. ``diffalign.config.io`` reads and
writes it. Each field has a help text and a range (``config.fields.option``). This module imports no heavy
package, since the command line's help is made from it.

The ``method`` section is a mapping whose ``type`` names a method (``diffalign methods`` lists them); the
other keys are the fields of that method's dataclass. ``strategies`` is a list of such mappings, whose types
are the strategies that ``diffalign methods`` lists below the methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffalign.config.data_schema import AlteredConfig, CurriculumConfig, DataConfig, FilterConfig
from diffalign.config.export_schema import ExportConfig
from diffalign.config.fields import (
    BATCH,
    BELOW_ONE,
    COUNT,
    COUNT_OR_ZERO,
    FOLDER,
    NAMES,
    PART,
    POSITIVE,
    SEED,
    SOME_NAMES,
    Rule,
    at_least,
    between,
    mapping_option,
    option,
    section,
)
from diffalign.config.rollout_schema import RolloutConfig

__all__ = [
    "AlteredConfig",
    "CheckpointConfig",
    "CurriculumConfig",
    "DataConfig",
    "ExportConfig",
    "FilterConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RolloutConfig",
    "Run",
    "TextEncoderConfig",
    "TextLoraConfig",
    "TrainingConfig",
    "ValidationConfig",
]

_BETAS: Rule = (lambda v: all(0 <= b < 1 for b in v)), "two numbers, each 0 or more and less than 1"
_CLIP: Rule = (lambda v: v >= 0), "0 (no clipping) or more"
_CHECKPOINTS: Rule = (
    (lambda v: isinstance(v, bool) or v >= 1),
    "true (all blocks), false (none), or a whole number N of 1 or more (every N-th block)",
)
_SPIKE: Rule = (lambda v: v == 0 or v > 1), "0 (never skip) or more than 1"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (peft)."""

    rank: int = option(16, "rank of the two factors", between(1, 2**16))
    alpha: float | None = option(None, "scale alpha / rank; null: alpha = rank, a scale of 1", POSITIVE)
    dropout: float = option(0.0, "dropout probability of the adapters' input", BELOW_ONE)
    targets: tuple[str, ...] = option(
        ("to_k", "to_q", "to_v", "to_out.0"), "suffixes of the names of the adapted modules", SOME_NAMES
    )
    rslora: bool = option(False, "scale alpha / sqrt(rank)")
    dora: bool = option(False, "weight-decomposed LoRA")


@dataclass(frozen=True)
class TextLoraConfig:
    """Adapters of CLIP text encoders, trained with those of the network."""

    rank: int = option(
        0, "rank of adapters of the CLIP text encoders of SD and SDXL; 0: they stay frozen", between(0, 2**16)
    )
    alpha: float | None = option(None, "scale alpha / rank; null: alpha = rank, a scale of 1", POSITIVE)
    targets: tuple[str, ...] = option(
        ("q_proj", "k_proj", "v_proj", "out_proj"), "suffixes of the names of the adapted modules", SOME_NAMES
    )
    encoders: tuple[str, ...] = option(
        (), "encoders that are trained, such as text_encoder_2; empty: all; the others stay cached", NAMES
    )


Quantized = Literal["none", "nf4", "int8", "torchao_int8", "torchao_float8"]
"""Storage formats of frozen weights; see ``diffalign.models.quantization``."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """Text encoders."""

    lora: TextLoraConfig = section(TextLoraConfig)
    quantize: Quantized = option("none", "store the text encoders in 4 or 8 bits while captions are encoded")


@dataclass(frozen=True)
class ModelConfig:
    """The diffusion model and the choice of its trained weights."""

    path: str = option(
        "",
        "hub id, diffusers folder, single-file checkpoint, run (or its checkpoint), or tiny:sdxl, tiny:sd15",
    )
    family: str = option("auto", "name of `diffalign models`; auto: read from the checkpoint")
    prediction: Literal["auto", "epsilon", "v_prediction", "sample", "edm"] = option(
        "auto",
        "what the network predicts; auto: read from the scheduler or the single file; edm: train a model of "
        "EDM's preconditioning, which auto does not detect",
    )
    zero_terminal_snr: bool | None = option(
        None, "rescale the betas so that the last step is pure noise; null: read from the checkpoint"
    )
    revision: str | None = option(None, "revision of a hub model: branch, tag or commit")
    variant: str | None = option(None, "variant of the weight files: fp16 loads *.fp16.safetensors")
    vae: str | None = option(None, "hub id or folder of another autoencoder, such as the fp16-fix one")
    network: str | None = option(
        None, "hub id or folder of another network (unet/ or transformer/), in place of the pipeline's"
    )
    expert: Literal["high", "low"] | None = option(
        None, "of a model of two experts (Wan 2.2 A14B), the one to train: of high or of low noise"
    )
    adapter: tuple[str, ...] = option(
        (), "LoRAs (folder, file or hub id) or runs that training starts from, folded into the frozen weights"
    )
    motion_adapter: str | None = option(
        None, "hub id or folder of a motion adapter: makes AnimateDiff of a Stable Diffusion 1.x"
    )
    max_sequence_length: int | None = option(
        None, "tokens of a T5 text encoder; null: the pipeline's default", between(1, 2**16)
    )
    embedded_guidance: float | None = option(
        None,
        "guidance scale given to a guidance-distilled network (FLUX.1-dev, FLUX.2-dev); null: the stock "
        "pipeline's default, 3.5 and 4",
        at_least(0),
    )
    vae_tiling: bool = option(False, "run the autoencoder by tiles: less memory, blended seams")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "precision of frozen weights; trained weights are always float32"
    )
    quantize: Quantized = option(
        "none",
        "store the frozen linear layers under LoRA in 4 or 8 bits: nf4, int8 (bitsandbytes), torchao_int8, "
        "torchao_float8",
    )
    train: Literal["lora", "full"] = option("lora", "train adapters, or all weights of the network")
    lora: LoraConfig = section(LoraConfig)
    text_encoder: TextEncoderConfig = section(TextEncoderConfig)
    gradient_checkpointing: bool | int = option(
        False,
        "recompute activations in the backward pass, less memory: true, all blocks; N, every N-th block",
        _CHECKPOINTS,
    )
    offload_activations: bool = option(
        False, "keep activations in main memory until the backward pass: less GPU memory, a slower step"
    )
    channels_last: bool = option(
        False, "weights of convolutions channels last in memory, for UNets of images: faster on tensor cores"
    )
    dropout: bool = option(False, "keep the network's own dropout, in policy and reference alike")
    attention: Literal[
        "auto", "flash", "efficient", "cudnn", "math", "xformers", "flash_hub", "_flash_3", "_flash_3_hub",
        "native", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math",
    ] = option(
        "auto",
        "attention kernel; auto: torch's choice; flash, efficient, cudnn, math: torch's; names of diffusers' "
        "back-ends: _native_* are torch's too, flash_hub and _flash_3_hub are loaded by the package kernels",
    )  # fmt: skip
    compile: bool = option(False, "compile the network with torch.compile")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    type: Literal["adamw", "adamw8bit", "adafactor", "paged_adamw", "paged_adamw8bit"] = option(
        "adamw", "name of the optimizer; paged: moments go to main memory where the GPU is short of it"
    )
    learning_rate: float = option(1e-5, "peak learning rate", POSITIVE)
    scale_lr: bool = option(
        False, "multiply the learning rate by the global batch size, as the published scripts do"
    )
    betas: tuple[float, float] = option((0.9, 0.999), "decay of Adam's first and second moment", _BETAS)
    eps: float = option(1e-8, "term that keeps Adam's denominator from 0", POSITIVE)
    weight_decay: float = option(1e-2, "decoupled weight decay", at_least(0))
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = option(
        "constant", "learning rate after the warm-up; all but constant end at 0"
    )
    cycles: int = option(1, "periods of schedule cosine_with_restarts", COUNT)
    power: float = option(1.0, "exponent of schedule polynomial; 1 is linear", POSITIVE)
    warmup_steps: int = option(0, "optimizer steps of the linear warm-up", COUNT_OR_ZERO)


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    steps: int = option(1000, "optimizer steps", COUNT)
    epochs: float | None = option(None, "passes over the training groups, in place of steps", POSITIVE)
    batch_size: int = option(1, "groups (pairs) of a micro-batch in each process", BATCH)
    accumulation: int = option(1, "micro-batches of an optimizer step", between(1, 10**6))
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "autocast precision of the network")
    float32_matmul: Literal["highest", "high", "medium"] = option(
        "high", "float32 products on a GPU: highest, exact; high, TF32; medium, bfloat16 where torch has it"
    )
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not clipped", _CLIP)
    spike_factor: float = option(
        0.0, "skip a step whose gradient norm is this many times its running mean; 0: never", _SPIKE
    )
    ema_decay: float = option(
        0.0, "decay of the exponential moving average of the weights; 0: none", BELOW_ONE
    )
    reference_every: int = option(
        0, "optimizer steps between updates of the reference by the policy; 0: it stays", COUNT_OR_ZERO
    )
    reference_mix: float = option(
        1.0, "1: the reference becomes a copy of the policy; less: reference + mix (policy - reference)", PART
    )
    shard: Literal["none", "full", "hybrid"] = option(
        "none",
        "spread weights, gradients and moments over the processes (FSDP2): full, over all of them; hybrid, "
        "over those of each node; none: every process holds all",
    )
    reshard: bool = option(
        True,
        "free a block's gathered weights between its forward and its backward; false: faster, more memory",
    )
    context: int = option(
        1,
        "processes that see the same rows and share the tokens of each (Ulysses; FLUX, Qwen-Image, Wan); "
        "1: every process has rows of its own",
        between(1, 1024),
    )
    seed: int = option(0, "seed of all randomness of the run", SEED)


@dataclass(frozen=True)
class LoggingConfig:
    """Logged metrics, their trackers, and intervals in optimizer steps."""

    every: int = option(10, "optimizer steps between two rows of metrics", COUNT)
    trackers: tuple[str, ...] = option(("tensorboard",), "any of tensorboard, wandb, trackio")
    project: str = option("diffalign", "name of the project in wandb and trackio")
    diagnostics_every: int = option(
        0,
        "optimizer steps between held-out diagnostics (accuracy, margin and error drift by timestep bin); "
        "0: only at the end",
        COUNT_OR_ZERO,
    )
    diagnostics_bins: int = option(5, "timestep bins of the diagnostics", between(1, 1000))


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints under OUTPUT/checkpoints/step-N."""

    every: int = option(500, "optimizer steps between two checkpoints", COUNT)
    limit: int = option(2, "checkpoints kept, the oldest are removed first; 0: all", COUNT_OR_ZERO)


@dataclass(frozen=True)
class ValidationConfig:
    """Images or videos drawn with fixed seeds during training, under OUTPUT/samples."""

    every: int = option(0, "optimizer steps between two validations; 0: none", COUNT_OR_ZERO)
    prompts: tuple[str, ...] = option(
        (),
        'a prompt, a list of prompts as YAML (\'["a cat", "a dog"]\'), or a file of prompts',
        NAMES,
        with_commas=True,
    )
    images_per_prompt: int = option(1, "images or videos of each prompt", between(1, 2**16))
    sampling_steps: int = option(25, "steps of the sampler", between(1, 10**5))
    guidance: float = option(5.0, "scale of classifier-free guidance; 1: none", at_least(0))
    frames: int | None = option(None, "frames of a video; null: data.frames", between(1, 2**16))
    fps: float | None = option(None, "frames a second that videos are written with; null: data.fps", POSITIVE)
    seed: int = option(0, "seed of the starting noise", SEED)
    rewards: tuple[str, ...] = option(
        (),
        "rewards that an online run is not trained on and that score its validation images: a warning tells "
        "when the run over-optimises",
        NAMES,
    )


@dataclass(frozen=True)
class Run:
    """The configuration of a run."""

    output: str = option("runs/diffalign", "the run directory", FOLDER)
    resume: str | None = option(None, "continue exactly from a checkpoint: latest, or its folder")
    resume_allow: tuple[str, ...] = option(
        (), "settings, data or model that may differ on resume, also --resume.allow data,learning_rate", NAMES
    )
    overwrite: bool = option(False, "replace another run in the output folder, which is an error otherwise")
    method: Mapping[str, Any] = mapping_option(
        lambda: {"type": "dpo"}, "another method by name; --method.FIELD sets a field of it"
    )
    strategies: tuple[Mapping[str, Any], ...] = option(
        (), "strategies around the method, as a YAML list: '[{type: sdpo, mu: 0.6}]'"
    )
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    training: TrainingConfig = section(TrainingConfig)
    logging: LoggingConfig = section(LoggingConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    validation: ValidationConfig = section(ValidationConfig)
    export: ExportConfig = section(ExportConfig)

    @property
    def size(self) -> tuple[int, int]:
        """The training size (height, width) in pixels; with buckets, the square of equal area."""
        side = (self.rollout.resolution if self.rollout.prompts else None) or self.data.resolution
        return self.data.height or side, self.data.width or side
