"""The flags of other people's scripts, as fields of the ``Run`` tree. One table, no torch.

Names are those of diffusers' ``train_diffusion_dpo.py`` and ``train_diffusion_dpo_sdxl.py``, of the
Diffusion-DPO launchers, and what TRL's users type. A flag that is known and not supported is an error that
says what to do instead.

On ``--beta_dpo``: our beta has the 1/2 of the paper, as the SDXL script does. The SD 1.5 script of
diffusers leaves it out, so its 2500 is our 5000: the flag is doubled for a model that is known to be SD
1.x.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffalign.config.io import parse_text
from diffalign.config.schema import Run
from diffalign.errors import UserError, unknown

Pairs = list[tuple[str, str]]  # (dotted field, text of the value)

VALIDATION_PROMPTS = (
    "a red bicycle leaning against a white wall",
    "portrait of an old sailor, oil painting",
    "a glass of water on a wooden table, morning light",
    "two foxes playing in the snow",
)
VALIDATION_STEPS = "200"  # the scripts' default


@dataclass(frozen=True)
class Alias:
    """A flag of another tool.

    Attributes:
        meaning: the field that it sets, or what it does, for the help.
        convert: text of the value (empty for a switch) to fields.
        switch: takes no value.
    """

    meaning: str
    convert: Callable[[str], Pairs]
    switch: bool = False


def _to(field: str) -> Alias:
    return Alias(field, lambda text: [(field, text)])


def _switch(field: str, value: str) -> Alias:
    """A flag without a value; ``--flag=false`` leaves the field as it is."""
    return Alias(f"{field} {value}", lambda text: [(field, value)] if _is_on(text) else [], switch=True)


def _is_on(text: str) -> bool:
    on = parse_text(text, bool) if text else True
    if not isinstance(on, bool):
        raise UserError(f"{text!r} after a switch; allowed: nothing, true or false")
    return on


def _named(flag: str, field: str, table: Mapping[str, str]) -> Alias:
    def convert(text: str) -> Pairs:
        if text not in table:
            raise unknown(f"value of --{flag}", text, table)
        return [(field, table[text])]

    return Alias(f"{field} ({', '.join(table)})", convert)


def _precision(text: str) -> Pairs:
    dtypes = {"no": "float32", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if text not in dtypes:
        raise unknown("value of --mixed_precision", text, dtypes)
    return [("training.mixed_precision", "no" if text == "fp32" else text), ("model.dtype", dtypes[text])]


def _half(flag: str) -> Alias:
    return Alias(
        f"as --mixed_precision {flag}", lambda text: _precision(flag) if _is_on(text) else [], switch=True
    )


def _trackers(text: str) -> Pairs:
    return [("logging.trackers", {"all": "tensorboard,wandb", "none": "[]"}.get(text, text))]


def _unsupported(flag: str, instead: str, switch: bool = False) -> Alias:
    def refuse(text: str) -> Pairs:
        raise UserError(f"--{flag} is not supported; {instead}")

    return Alias(f"not supported: {instead}", refuse, switch)


_LOSSES = {"sigmoid": "logistic", "logistic": "logistic", "hinge": "hinge", "ipo": "ipo", "robust": "robust"}
_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
}
_OPTIMIZERS = {
    "adamw": "adamw", "AdamW": "adamw", "adamw8bit": "adamw8bit", "AdamW8bit": "adamw8bit",
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_8bit": "adamw8bit", "adafactor": "adafactor",
}  # fmt: skip
_ONE = "the loop counts optimizer steps: use --max_train_steps"
_HUB = "train first, then upload the folder: hf upload OWNER/NAME OUTPUT/aligned"
_COLUMNS = "columns are found by name (caption or prompt, jpg_0, jpg_1, label_0): rename yours"
_STATIC = "the reference stays the base model"

ALIASES: Mapping[str, Alias] = {
    # model
    "pretrained_model_name_or_path": _to("model.path"),
    "model_name_or_path": _to("model.path"),
    "pretrained_vae_model_name_or_path": _to("model.vae"),
    "revision": _to("model.revision"),
    "variant": _to("model.variant"),
    "sdxl": _switch("model.family", "sdxl"),
    "gradient_checkpointing": _switch("model.gradient_checkpointing", "true"),
    "enable_xformers_memory_efficient_attention": _switch("model.attention", "xformers"),
    "rank": _to("model.lora.rank"),
    "lora_r": _to("model.lora.rank"),
    "lora_alpha": _to("model.lora.alpha"),
    "lora_dropout": _to("model.lora.dropout"),
    "lora_layers": _to("model.lora.targets"),
    "lora_target_modules": _to("model.lora.targets"),
    "use_dora": _switch("model.lora.dora", "true"),
    "use_peft": _switch("model.train", "lora"),
    # data
    "dataset_name": _to("data.path"),
    "train_data_dir": _to("data.path"),
    "dataset_split_name": _to("data.split"),
    "split": _to("data.split"),
    "dataset_streaming": _switch("data.streaming", "true"),
    "max_train_samples": _to("data.limit"),
    "resolution": _to("data.resolution"),
    "random_crop": _switch("data.crop", "random"),
    "center_crop": _switch("data.crop", "center"),
    "random_flip": _switch("data.flip", "true"),
    "no_hflip": _switch("data.flip", "false"),
    "use_aspect_ratio_buckets": _switch("data.buckets", "true"),
    "proportion_empty_prompts": _to("data.prompt_dropout"),
    "vae_encode_batch_size": _to("data.cache_batch_size"),
    "dataloader_num_workers": _to("data.workers"),
    # method
    "beta_dpo": Alias(
        "method.beta, with the paper's 1/2 (doubled for SD 1.x)", lambda text: [("beta_dpo", text)]
    ),
    "beta": _to("method.beta"),
    "loss_type": _named("loss_type", "method.loss.type", _LOSSES),
    "label_smoothing": Alias(
        "method.loss.label_smoothing",
        lambda text: [("method.loss.type", "logistic"), ("method.loss.label_smoothing", text)],
    ),
    "sft": _switch("method", "sft"),
    "noise_offset": Alias(
        "method.noising.noise_offset",
        lambda text: [("method.noising.type", "forward"), ("method.noising.noise_offset", text)],
    ),
    # optimizer
    "learning_rate": _to("optimizer.learning_rate"),
    "scale_lr": _switch("optimizer.scale_lr", "true"),
    "lr_scheduler": _named("lr_scheduler", "optimizer.schedule", _SCHEDULES),
    "lr_scheduler_type": _named("lr_scheduler_type", "optimizer.schedule", _SCHEDULES),
    "lr_warmup_steps": _to("optimizer.warmup_steps"),
    "warmup_steps": _to("optimizer.warmup_steps"),
    "optimizer": _named("optimizer", "optimizer.type", _OPTIMIZERS),
    "optim": _named("optim", "optimizer.type", _OPTIMIZERS),
    "use_8bit_adam": _switch("optimizer.type", "adamw8bit"),
    "use_adafactor": _switch("optimizer.type", "adafactor"),
    "adam_beta1": Alias("optimizer.betas, the first", lambda text: [("beta1", text)]),
    "adam_beta2": Alias("optimizer.betas, the second", lambda text: [("beta2", text)]),
    "adam_weight_decay": _to("optimizer.weight_decay"),
    "weight_decay": _to("optimizer.weight_decay"),
    "adam_epsilon": _to("optimizer.eps"),
    # loop
    "train_batch_size": _to("training.batch_size"),
    "per_device_train_batch_size": _to("training.batch_size"),
    "gradient_accumulation_steps": _to("training.accumulation"),
    "max_train_steps": _to("training.steps"),
    "max_steps": _to("training.steps"),
    "mixed_precision": Alias("training.mixed_precision and model.dtype (no, bf16, fp16)", _precision),
    "bf16": _half("bf16"),
    "fp16": _half("fp16"),
    "max_grad_norm": _to("training.max_grad_norm"),
    "use_ema": _switch("training.ema_decay", "0.9999"),
    "seed": _to("training.seed"),
    # output
    "output_dir": _to("output"),
    "resume_from_checkpoint": _to("resume"),
    "checkpointing_steps": _to("checkpoint.every"),
    "save_steps": _to("checkpoint.every"),
    "checkpoints_total_limit": _to("checkpoint.limit"),
    "save_total_limit": _to("checkpoint.limit"),
    "report_to": Alias("logging.trackers (tensorboard, wandb, trackio, all, none)", _trackers),
    "tracker_name": _to("logging.project"),
    "tracker_project_name": _to("logging.project"),
    "logging_steps": _to("logging.every"),
    "run_validation": Alias(
        "validation.every 200, and prompts", lambda text: [("run_validation", "")], switch=True
    ),
    "validation_steps": _to("validation.every"),
    "validation_prompt": Alias("validation.prompts, one", lambda text: [("validation_prompt", text)]),
    "validation_prompts": Alias("validation.prompts, one", lambda text: [("validation_prompt", text)]),
    "num_validation_images": _to("validation.images_per_prompt"),
    # known, and not supported
    "num_train_epochs": _unsupported("num_train_epochs", _ONE),
    "lr_num_cycles": _unsupported("lr_num_cycles", "schedules are constant, linear and cosine"),
    "lr_power": _unsupported("lr_power", "schedules are constant, linear and cosine"),
    "cache_dir": _unsupported(
        "cache_dir", "downloads go where HF_HOME says; our own cache is --data.cache_dir"
    ),
    "dataset_config_name": _unsupported(
        "dataset_config_name", "download the set and give its files as --data.path"
    ),
    "image_column": _unsupported("image_column", _COLUMNS),
    "caption_column": _unsupported("caption_column", _COLUMNS),
    "choice_model": _unsupported(
        "choice_model", "score the images first (diffalign score) and train on the labels"
    ),
    "unet_init": _unsupported("unet_init", "give the whole model as --model.path"),
    "is_turbo": _unsupported(
        "is_turbo", "set --method.time '{type: listed, times: [0.249, 0.499, 0.749, 0.999]}'", True
    ),
    "input_perturbation": _unsupported(
        "input_perturbation", "set --method.noising '{type: forward, input_perturbation: 0.1}'"
    ),
    "allow_tf32": _unsupported(
        "allow_tf32", "use --mixed_precision bf16, or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1", True
    ),
    "push_to_hub": _unsupported("push_to_hub", _HUB, True),
    "hub_model_id": _unsupported("hub_model_id", _HUB),
    "hub_token": _unsupported("hub_token", "log in once with: hf auth login"),
    "logging_dir": _unsupported("logging_dir", "logs are written under the output folder"),
    "hard_skip_resume": _unsupported(
        "hard_skip_resume", "resuming is exact and needs no skipping; leave it out", True
    ),
    "prior_generation_precision": _unsupported(
        "prior_generation_precision", "it has no effect; leave it out"
    ),
    "local_rank": _unsupported("local_rank", "torchrun tells it by the environment; leave it out"),
    "precompute_ref_log_probs": _unsupported(
        "precompute_ref_log_probs", "noise is drawn anew, so it cannot be", True
    ),
    "sync_ref_model": _unsupported("sync_ref_model", _STATIC, True),
    "ref_model_mixup_alpha": _unsupported("ref_model_mixup_alpha", _STATIC),
    "ref_model_sync_steps": _unsupported("ref_model_sync_steps", _STATIC),
    "f_divergence_type": _unsupported("f_divergence_type", "the divergence is the reverse KL"),
    "loss_weights": _unsupported("loss_weights", "one loss at a time: --loss_type"),
}


def late(run: Run, given: Mapping[str, list[str]]) -> tuple[Pairs, list[str]]:
    """Fields, and notes to print, of the flags whose meaning depends on the rest of the run.

    Args:
        run: with every other flag applied.
        given: texts by pseudo-field: beta_dpo, beta1, beta2, run_validation, validation_prompt.
    """
    pairs: Pairs = []
    notes: list[str] = []
    if "beta_dpo" in given:
        text, value = given["beta_dpo"][-1], parse_text(given["beta_dpo"][-1], float)
        if not isinstance(value, int | float):
            raise UserError(f"--beta_dpo={text!r}; allowed: a number")
        doubled = is_sd1(run)
        pairs.append(("method.beta", str(2 * value if doubled else value)))
        script = (
            "diffusers' SD 1.5 script, which has no 1/2"
            if doubled
            else "diffusers' SDXL script, which has the 1/2"
        )
        notes.append(f"--beta_dpo {text} is read as of {script}: method.beta = {pairs[-1][1]}")
    if "beta1" in given or "beta2" in given:
        first, second = (given.get(f"beta{i}", [str(run.optimizer.betas[i - 1])])[-1] for i in (1, 2))
        pairs.append(("optimizer.betas", f"{first},{second}"))
    prompts = [text for text in given.get("validation_prompt", []) if text]
    if "run_validation" in given and not prompts and not run.validation.prompts:
        prompts = list(VALIDATION_PROMPTS)
        notes.append(
            f"--run_validation without a --validation_prompt draws {len(prompts)} prompts of our own"
        )
    if prompts:
        pairs.append(("validation.prompts", "[" + ", ".join(f'"{_escaped(p)}"' for p in prompts) + "]"))
    if prompts and not run.validation.every:
        pairs.append(("validation.every", VALIDATION_STEPS))
    return pairs, notes


def is_sd1(run: Run) -> bool:
    """Whether the model is known to be Stable Diffusion 1.x: by its family, its name, or its folder."""
    from diffalign.models.families.registry import FAMILIES

    if run.model.family != "auto":
        return run.model.family == "sd15"
    if run.model.path in (*FAMILIES["sd15"].same_shapes, "tiny:sd15"):
        return True
    try:
        index = json.loads(Path(run.model.path, "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a hub id, or a folder that loading will complain about
        return False
    return bool(index.get("_class_name") == FAMILIES["sd15"].pipeline)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
