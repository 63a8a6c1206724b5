"""A run as a tree of frozen dataclasses: the only place where a default stands.

A YAML file gives values, dotted flags (``--model.lora.rank 32``) override them, and the resolved tree is
written into the run directory as ``config.yaml``, which loads again. ``diffalign.config.io`` reads and
writes it. This module imports nothing heavy: the command line's help is made from it.

The ``method`` section is a mapping whose ``type`` names a method (``diffalign methods`` lists them); the
other keys are the fields of that method's dataclass. ``strategies`` is a list of such mappings, whose types
are the strategies that ``diffalign methods`` lists below the methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (peft)."""

    rank: int = 16
    alpha: float | None = None  # None: alpha = rank, a scale of 1
    dropout: float = 0.0
    targets: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")  # module name suffixes
    rslora: bool = False  # scale alpha / sqrt(rank)
    dora: bool = False  # weight-decomposed LoRA


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    path: str = ""  # hub id, local diffusers folder, single-file checkpoint, or tiny:sdxl / tiny:sd15
    family: str = "auto"  # a name of `diffalign models`; auto reads it off the checkpoint
    revision: str | None = None
    variant: str | None = None  # "fp16" loads *.fp16.safetensors
    vae: str | None = None  # hub id or folder of another VAE, such as the fp16-fix one
    motion_adapter: str | None = None  # hub id or folder: makes AnimateDiff of a Stable Diffusion 1.x
    max_sequence_length: int | None = None  # tokens of a T5 text encoder; null: as the pipeline has it
    embedded_guidance: float = 3.5  # that a guidance-distilled network (FLUX.1-dev) is told
    vae_tiling: bool = False  # autoencoder by tiles: less memory, seams are blended
    dtype: Literal["float32", "bfloat16", "float16"] = (
        "float32"  # of frozen weights; trained ones are always float32
    )
    train: Literal["lora", "full"] = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    gradient_checkpointing: bool = False
    attention: Literal["auto", "flash", "efficient", "cudnn", "math", "xformers"] = "auto"
    compile: bool = False


@dataclass(frozen=True)
class CurriculumConfig:
    """Groups by how far apart their best and worst are, the widest gaps first."""

    stages: int = 0  # 0: none, every group from the start
    steps: int = 500  # optimizer steps a stage; the last one goes on
    by: Literal["score", "reward"] = "score"  # what the gap is measured in
    min_gap: float = 0.0  # groups of a smaller gap are never trained on
    cumulative: bool = True  # a stage keeps the groups of the earlier ones


@dataclass(frozen=True)
class AlteredConfig:
    """How the caption of an image is made wrong (view ``captions``)."""

    by: Literal["swap", "llm"] = "swap"  # a word exchanged offline, or an OpenAI-compatible chat endpoint
    seed: int = 0  # of the swaps
    url: str = "http://localhost:8000/v1"  # of the endpoint: /chat/completions is added
    model: str = ""  # of the endpoint
    key: str = "OPENAI_API_KEY"  # name of the environment variable that holds its key, if it wants one
    timeout: float = 60.0  # seconds an answer may take
    retries: int = 5  # after a failure that may pass, waiting twice as long each time
    answers: str = "altered_captions.jsonl"  # file that keeps the endpoint's answers: none is asked for twice


@dataclass(frozen=True)
class DataConfig:
    """Preferences, and how images or videos become latents."""

    # parquet file or glob, folder, jsonl, csv, hub dataset, or tiny:pairs (lists, likes, captions, experts)
    path: str = ""
    format: Literal["auto", "parquet", "folder", "jsonl", "csv", "hub"] = "auto"
    split: str = "train"  # of a hub dataset
    streaming: bool = False  # of a hub dataset: encode as it arrives, keep no copy of the set
    limit: int | None = None  # read at most this many rows
    label: str = ""  # column of a csv with several labels, such as VQ; empty: Overall, or the only one
    # as the set has them; every two rivals; likes, once an image; the best only; right and wrong caption; one
    # label of dense ones, who wins more segments
    view: Literal["auto", "pairs", "likes", "demonstrations", "captions", "majority"] = "auto"
    likes_share: float | None = 0.8  # share of likes among the single images drawn; null: as the set has them
    best: int | None = None  # of view demonstrations: this many images by reward instead of each group's best
    altered: AlteredConfig = field(default_factory=AlteredConfig)
    rewards: tuple[str, ...] = ()  # each image is scored by these as well (`diffalign rewards`)
    rewards_as: Literal["extra", "score", "wins"] = "extra"  # beside the label, or instead of it
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    resolution: int = 512  # pixels of the square, or of the bucket of equal area
    height: int | None = None  # pixels, with width: in place of the square
    width: int | None = None
    frames: int | None = None  # of a video, at most; null: images
    fps: float | None = None  # that videos are read at; null: that of the first of a group
    segment_seconds: float = 1.0  # that a dense label is about, where the set does not say
    crop: Literal["center", "random"] = "center"
    flip: bool = False  # horizontal flips, the same for all images of a group
    buckets: bool = False  # aspect-ratio buckets; a group stays together
    bucket_step: int = 64  # bucket sides are multiples of this many pixels
    prompt_dropout: float = 0.0  # share of groups trained on the empty prompt
    flip_labels: float = 0.0  # share of labels turned round: 1 is the control that must go down
    drop: str | None = None  # a file of rows to leave out, as `diffalign displacement` writes it
    holdout: float = 0.05  # share of groups kept for diagnostics, never trained on
    max_holdout: int = 256  # groups
    posterior: Literal["sample", "mean"] = "sample"  # of the VAE, drawn anew at each visit
    cache_dir: str | None = None  # None: <output>/cache
    cache_batch_size: int = 8  # images encoded at once; of videos also how many are held decoded
    workers: int = 0  # data-loader processes


@dataclass(frozen=True)
class RolloutConfig:
    """Online: what the policy samples in a round and who judges it; without prompts a run is offline."""

    prompts: str = ""  # a file of prompts, tiny:train, or a built-in list; empty: the run is offline
    # what a round holds: finished samples, steps of whole trajectories, or a tree of rival steps
    shape: Literal["auto", "samples", "trajectories", "tree"] = "auto"  # auto: what the method learns from
    prompts_per_round: int = 8  # per process
    samples: int = 2  # per prompt; of a tree: candidates at each branch
    shared_noise: bool = True  # a prompt's samples start from one noise
    steps: int = 20  # of the sampler
    eta: float = 1.0  # noise of each step: 1 is ancestral sampling; of a flow model the level of its form
    form: Literal["sde", "cps", "dance"] = "sde"  # of a flow model's noisy step: Flow-GRPO's two, DanceGRPO's
    window: int | None = None  # steps that are draws, and learnt from, the others being the ODE's; null: all
    window_shift: int = 25  # rounds after which the window moves on, round the trajectory; 0: it stays
    window_stride: int = 1  # steps that it moves by
    guidance: float = 5.0  # classifier-free; 1: none
    batch_size: int = 8  # samples that the network is asked about at once; guidance shows it each twice
    resolution: int | None = None  # of the images; null: data.resolution
    trained_steps: float = 1.0  # share of a trajectory's steps that is learnt from, drawn at random
    lowest_time: float = 0.0  # steps from times (0 to 1) below are not learnt from: little is decided there
    passes: int = 1  # times that a round is learnt from
    # samples of a prompt that are learnt from at once, by methods that take each by its advantage; null: all
    part: int | None = None
    first_branch: int = 4  # of a tree: steps before it
    inner_steps: int = 0  # of a tree: steps that a candidate takes alone before it is judged
    threshold: float = 0.0  # of a tree: best and worst are a tie below this difference of preference
    # of a tree: the clean estimate that is judged is the network's at the candidate (published), or made of
    # the prediction that the candidate was drawn with: no network call for those that are not continued;
    # none: a latent_reward judges the noisy candidate itself, and nothing is decoded (LPO)
    estimate: Literal["candidate", "parent", "none"] = "candidate"
    rewards: tuple[str, ...] = ()  # specs of `diffalign rewards`, each with a weight if wanted: 0.5*pickscore
    combine: Literal["sum", "rank", "wins", "pareto"] = "sum"  # of several rewards
    normalise: Literal["none", "round"] = "none"  # each reward to mean 0 and std 1 over the round
    # for methods that ask for it: a score against mean and std of its rivals, of its prompt over rounds, ...
    advantage: Literal[
        "none", "group", "group_std", "group_batch", "batch", "prompt", "raw", "best", "ends"
    ] = "none"
    decoder: str | None = None  # folder or hub id of a tiny autoencoder that judged images are decoded by
    # process: by a process beside, while the policy samples the rest of the round, batch_size at a time
    scoring: Literal["inline", "process"] = "inline"
    by: Literal["rewards", "people"] = "rewards"  # people: the run stops for labels in each round
    keep: int = 2  # rounds kept on disk; those that people label are all kept


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    type: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    learning_rate: float = 1e-5
    scale_lr: bool = False  # multiply by the global batch size, as the published scripts do
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 1  # groups (pairs) per process and micro-batch
    accumulation: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    max_grad_norm: float = 1.0
    spike_factor: float = 0.0  # skip a step whose gradient norm is this many times its running mean; 0: never
    ema_decay: float = 0.0  # 0: no moving average
    reference_every: int = 0  # the reference becomes the policy every so many steps; 0: it stays
    reference_mix: float = 1.0  # 1: a copy; less: reference + mix (policy - reference)
    seed: int = 0


@dataclass(frozen=True)
class LoggingConfig:
    """What is written down, and how often (in optimizer steps)."""

    every: int = 10
    trackers: tuple[str, ...] = ("tensorboard",)  # tensorboard, wandb, trackio
    project: str = "diffalign"
    diagnostics_every: int = (
        0  # held-out accuracy, margin and error drift by timestep bin; 0: only at the end
    )
    diagnostics_bins: int = 5


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints under <output>/checkpoints/step-N."""

    every: int = 500
    limit: int = 2  # keep this many, the oldest go first


@dataclass(frozen=True)
class ValidationConfig:
    """Images or videos drawn with fixed seeds during training, under <output>/samples."""

    every: int = 0  # optimizer steps; 0: none
    prompts: tuple[str, ...] = ()
    images_per_prompt: int = 1
    sampling_steps: int = 25
    guidance: float = 5.0
    frames: int | None = None  # of videos; null: data.frames
    fps: float | None = None  # that videos are written with; null: data.fps
    seed: int = 0
    # an online run's images are also scored by these, which it is not trained on: an alarm tells when it
    # over-optimises
    rewards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """Everything that a run is made of."""

    output: str = "runs/diffalign"
    resume: str | None = None  # "latest", or a checkpoint folder
    overwrite: bool = False  # an output folder that holds another run is an error otherwise
    method: Mapping[str, Any] = field(default_factory=lambda: {"type": "dpo"})
    strategies: tuple[Mapping[str, Any], ...] = ()  # around the method, e.g. [{type: sdpo, mu: 0.6}]
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
