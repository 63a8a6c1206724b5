"""Flags of other training scripts, as fields of the ``Run`` tree. One table, no torch.

Names are those of diffusers' ``train_diffusion_dpo.py`` and ``train_diffusion_dpo_sdxl.py``, of
SalesforceAIResearch/DiffusionDPO's ``train.py``, and TRL. Every flag has an effect, prints a note that it has
none, or is an error that says what to do instead. ``cli.presets`` holds the scripts' defaults.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffalign.config.io import parse_text
from diffalign.errors import UserError, unknown

Pairs = list[tuple[str, str]]  # (dotted field, text of the value)


@dataclass(frozen=True)
class Alias:
    """A flag of another tool.

    Attributes:
        meaning: the field that it sets, or what it does, for the help.
        convert: text of the value (empty for a switch) to fields.
        switch: takes no value.
        many: whether it takes all words up to the next flag.
        joined: whether these are one value, separated by commas.
        note: to print when the flag is given: why it has no effect, or what is done instead.
        script: the only tool that has the flag; empty: several have it.
    """

    meaning: str
    convert: Callable[[str], Pairs]
    switch: bool = False
    many: bool = False
    joined: bool = False
    note: str = ""
    script: str = ""


def _to(field: str, script: str = "") -> Alias:
    return Alias(field, lambda text: [(field, text)], script=script)


def _switch(field: str, value: str, script: str = "") -> Alias:
    """Return a flag without a value; ``--flag=false`` leaves the field as it is."""

    def convert(text: str) -> Pairs:
        return [(field, value)] if _is_on(text) else []

    return Alias(f"{field} {value}", convert, switch=True, script=script)


def _unused(why: str, switch: bool = False, script: str = "") -> Alias:
    """Return a flag that has no effect here, and why."""
    return Alias(f"no effect: {why}", lambda text: [], switch, note=why, script=script)


def _is_on(text: str) -> bool:
    on = parse_text(text, bool) if text else True
    if not isinstance(on, bool):
        raise UserError(f"{text!r} after a switch; allowed: nothing, true or false")
    return on


def _named(flag: str, field: str, table: Mapping[str, str], script: str = "") -> Alias:
    def convert(text: str) -> Pairs:
        if text not in table:
            raise unknown(f"value of --{flag}", text, table)
        return [(field, table[text])]

    return Alias(f"{field} ({', '.join(table)})", convert, script=script)


def _precision(text: str) -> Pairs:
    dtypes = {"no": "float32", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if text not in dtypes:
        raise unknown("value of --mixed_precision", text, dtypes)
    return [("training.mixed_precision", "no" if text == "fp32" else text), ("model.dtype", dtypes[text])]


def _half(flag: str) -> Alias:
    return Alias(
        f"as --mixed_precision {flag}",
        lambda text: _precision(flag) if _is_on(text) else [],
        switch=True,
        script="trl",
    )


def _trackers(text: str) -> Pairs:
    return [("logging.trackers", {"all": "tensorboard,wandb", "none": "[]"}.get(text, text))]


def _unsupported(flag: str, instead: str, switch: bool = False, script: str = "") -> Alias:
    def refuse(text: str) -> Pairs:
        raise UserError(f"--{flag} is not supported; {instead}")

    return Alias(f"not supported: {instead}", refuse, switch, script=script)


def _judge(text: str) -> Pairs:
    """Return a judge in place of the labels, as ``--choice_model`` of Diffusion-DPO."""
    table = {"aes": "aesthetic_v2", "clip": "clipscore", "hps": "hpsv2", "pickscore": "pickscore"}
    if text not in table:
        raise unknown("value of --choice_model", text, table)
    return [("data.rewards", table[text]), ("data.rewards_as", "score")]


def _noising(field: str) -> Callable[[str], Pairs]:
    """Return a setting of forward noising; 0, the scripts' default, leaves the method as it is."""

    def convert(text: str) -> Pairs:
        if parse_text(text, float) == 0:
            return []
        return [("method.noising.type", "forward"), (f"method.noising.{field}", text)]

    return convert


def _divergence(text: str) -> Pairs:
    table = {"reverse_kl": [], "js_divergence": ["jensen_shannon"], "alpha_divergence": ["alpha"]}
    if text not in table:
        raise unknown("value of --f_divergence_type", text, table)
    return [pair for name in table[text] for pair in (("method", "fdpo"), ("method.divergence.type", name))]


_LOSSES = {"sigmoid": "logistic", "logistic": "logistic", "hinge": "hinge", "ipo": "ipo", "robust": "robust"}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
}
_OPTIMIZERS = {
    "adamw": "adamw", "AdamW": "adamw", "adamw8bit": "adamw8bit", "AdamW8bit": "adamw8bit",
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_8bit": "adamw8bit", "adafactor": "adafactor",
    "paged_adamw": "paged_adamw", "paged_adamw_32bit": "paged_adamw", "paged_adamw_8bit": "paged_adamw8bit",
}  # fmt: skip
_D, _S, _T = "diffusers", "salesforce", "trl"
_HUB = "nothing is uploaded; when the run is done: hf upload OWNER/NAME OUTPUT/aligned"
_TURBO = "{type: listed, times: [0.249, 0.499, 0.749, 0.999]}"

ALIASES: Mapping[str, Alias] = {
    # model
    "pretrained_model_name_or_path": _to("model.path"),
    "model_name_or_path": _to("model.path", _T),
    "pretrained_vae_model_name_or_path": _to("model.vae"),
    "revision": _to("model.revision"),
    "variant": _to("model.variant", _D),
    "sdxl": _switch("model.family", "sdxl", _S),
    "gradient_checkpointing": _switch("model.gradient_checkpointing", "true"),
    "enable_xformers_memory_efficient_attention": _switch("model.attention", "xformers", _D),
    "rank": _to("model.lora.rank", _D),
    "lora_r": _to("model.lora.rank", _T),
    "lora_alpha": _to("model.lora.alpha"),
    "lora_dropout": _to("model.lora.dropout"),
    "lora_layers": _to("model.lora.targets"),
    "lora_target_modules": Alias(
        "model.lora.targets", lambda text: [("model.lora.targets", text)], many=True, joined=True, script=_T
    ),
    "use_dora": _switch("model.lora.dora", "true"),
    "use_peft": _switch("model.train", "lora", _T),
    # data
    "dataset_name": _to("data.path"),
    "train_data_dir": _to("data.path", _S),
    "dataset_split_name": _to("data.split", _D),
    "split": _to("data.split", _S),
    "dataset_streaming": _switch("data.streaming", "true", _T),
    "max_train_samples": _to("data.limit"),
    "resolution": _to("data.resolution"),
    "random_crop": _switch("data.crop", "random"),
    "center_crop": _switch("data.crop", "center"),
    "random_flip": _switch("data.flip", "true"),
    "no_hflip": _switch("data.flip", "false"),
    "use_aspect_ratio_buckets": _switch("data.buckets", "true"),
    "proportion_empty_prompts": _to("data.prompt_dropout", _S),
    "vae_encode_batch_size": _to("data.cache_batch_size", _D),
    "dataloader_num_workers": _to("data.workers"),
    "dataset_config_name": _to("data.config", _S),
    "image_column": Alias("data.columns image=...", lambda text: [("image_column", text)], script=_S),
    "caption_column": Alias("data.columns prompt=...", lambda text: [("caption_column", text)], script=_S),
    "choice_model": Alias(
        "data.rewards, in place of the labels (aes, clip, hps, pickscore)", _judge, script=_S
    ),
    # method
    "beta_dpo": Alias("method.beta; see above", lambda text: [("beta_dpo", text)]),
    "beta": _to("method.beta", _T),
    "loss_type": _named("loss_type", "method.loss.type", _LOSSES),
    "label_smoothing": Alias(
        "method.loss.label_smoothing, or label_noise of the loss robust",
        lambda text: [("label_smoothing", text)],
        script=_T,
    ),
    "f_divergence_type": Alias(
        "method fdpo and its divergence (reverse_kl, js_divergence, alpha_divergence)", _divergence, script=_T
    ),
    "sft": _switch("method", "sft", _S),
    "is_turbo": Alias(
        "method.time: SDXL-Turbo's four times",
        lambda text: [("method.time", _TURBO)] if _is_on(text) else [],
        switch=True,
        script=_D,
    ),
    "noise_offset": Alias("method.noising.noise_offset", _noising("noise_offset"), script=_S),
    "input_perturbation": Alias(
        "method.noising.input_perturbation", _noising("input_perturbation"), script=_S
    ),
    "sync_ref_model": Alias(
        "training.reference_every 512, and training.reference_mix 0.6",
        lambda text: [("sync_ref_model", "")] if _is_on(text) else [],
        switch=True,
        script=_T,
    ),
    "ref_model_sync_steps": _to("training.reference_every", _T),
    "ref_model_mixup_alpha": _to("training.reference_mix", _T),
    # optimizer
    "learning_rate": _to("optimizer.learning_rate"),
    "scale_lr": _switch("optimizer.scale_lr", "true"),
    "lr_scheduler": Alias(
        f"optimizer.schedule ({', '.join(SCHEDULES)})", lambda text: [("lr_scheduler", text)]
    ),
    "lr_scheduler_type": _named("lr_scheduler_type", "optimizer.schedule", SCHEDULES, _T),
    "lr_warmup_steps": _to("optimizer.warmup_steps"),
    "warmup_steps": _to("optimizer.warmup_steps", _T),
    "lr_num_cycles": _to("optimizer.cycles", _D),
    "lr_power": _to("optimizer.power", _D),
    "optimizer": _named("optimizer", "optimizer.type", _OPTIMIZERS),
    "optim": _named("optim", "optimizer.type", _OPTIMIZERS, _T),
    "use_8bit_adam": _switch("optimizer.type", "adamw8bit", _D),
    "use_adafactor": _switch("optimizer.type", "adafactor", _S),
    "adam_beta1": Alias("optimizer.betas, the first", lambda text: [("beta1", text)]),
    "adam_beta2": Alias("optimizer.betas, the second", lambda text: [("beta2", text)]),
    "adam_weight_decay": _to("optimizer.weight_decay"),
    "weight_decay": _to("optimizer.weight_decay", _T),
    "adam_epsilon": _to("optimizer.eps"),
    # loop
    "train_batch_size": _to("training.batch_size"),
    "per_device_train_batch_size": _to("training.batch_size", _T),
    "gradient_accumulation_steps": _to("training.accumulation"),
    "max_train_steps": _to("training.steps"),
    "max_steps": _to("training.steps", _T),
    "mixed_precision": Alias("training.mixed_precision and model.dtype (no, bf16, fp16)", _precision),
    "bf16": _half("bf16"),
    "fp16": _half("fp16"),
    "max_grad_norm": _to("training.max_grad_norm"),
    "use_ema": _switch("training.ema_decay", "0.9999"),
    "seed": _to("training.seed"),
    # output
    "output_dir": _to("output"),
    "resume_from_checkpoint": Alias(
        "resume; true is latest", lambda text: [("resume", "latest" if text.lower() == "true" else text)]
    ),
    "resume.allow": _to("resume_allow"),
    "checkpointing_steps": _to("checkpoint.every"),
    "save_steps": _to("checkpoint.every", _T),
    "checkpoints_total_limit": _to("checkpoint.limit", _D),
    "save_total_limit": _to("checkpoint.limit", _T),
    "report_to": Alias("logging.trackers (tensorboard, wandb, trackio, all, none)", _trackers),
    "tracker_name": _to("logging.project", _D),
    "tracker_project_name": _to("logging.project", _S),
    "logging_steps": _to("logging.every", _T),
    "run_validation": Alias(
        "validation.every 200, and prompts",
        lambda text: [("run_validation", "")] if _is_on(text) else [],
        switch=True,
        script=_D,
    ),
    "validation_steps": Alias(
        "validation.every, with --run_validation or prompts", lambda text: [("validation_steps", text)]
    ),
    "validation_prompt": Alias("validation.prompts", lambda text: [("validation_prompt", text)], many=True),
    "validation_prompts": Alias("validation.prompts", lambda text: [("validation_prompt", text)], many=True),
    "num_validation_images": _to("validation.images_per_prompt"),
    "num_train_epochs": Alias(
        "training.epochs, unless --max_train_steps is given", lambda text: [("num_train_epochs", text)]
    ),
    # without effect
    "cache_dir": _unused("downloads go where HF_HOME says; the cache of encoded data is --data.cache_dir"),
    "logging_dir": _unused("logs are written under the output folder"),
    "local_rank": _unused("the launcher tells the rank by the environment"),
    "allow_tf32": _unused("GPUs that have TF32 use it unless training.float32_matmul is highest", True),
    "prior_generation_precision": _unused("the scripts do not use it either", script=_D),
    "hard_skip_resume": _unused("resuming is exact and skips no data", True, _S),
    "push_to_hub": _unused(_HUB, True, _D),
    "hub_model_id": _unused(_HUB),
    "hub_token": _unused("it is not stored; log in once with: hf auth login", script=_D),
    # known, and not supported
    "dreamlike_pairs_only": _unsupported(
        "dreamlike_pairs_only",
        "leave out the other rows first: keep those whose model_0 and model_1 name dreamlike",
        True,
        _S,
    ),
    "unet_init": _unsupported(
        "unet_init", "put the UNet into a copy of the model's folder and give that as --model.path", script=_S
    ),
    "precompute_ref_log_probs": _unsupported(
        "precompute_ref_log_probs",
        "noise is drawn anew at each visit, so there is nothing to compute once",
        True,
        _T,
    ),
    "loss_weights": _unsupported("loss_weights", "one loss at a time: --loss_type", script=_T),
}
