"""Flags of other tools become fields of the tree, or an error that says what to do instead."""

import pytest

from diffalign.cli.aliases import ALIASES
from diffalign.cli.flags import read_flags, resolve
from diffalign.config.ranges import get
from diffalign.errors import UserError


def run_of(*argv):
    return resolve(read_flags(argv))[0]


# The flags of train_diffusion_dpo.py and train_diffusion_dpo_sdxl.py of diffusers.
DIFFUSERS = """
pretrained_model_name_or_path pretrained_vae_model_name_or_path revision dataset_name dataset_split_name
variant run_validation validation_steps max_train_samples output_dir cache_dir seed resolution
vae_encode_batch_size no_hflip random_crop train_batch_size num_train_epochs max_train_steps
checkpointing_steps checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps
gradient_checkpointing beta_dpo loss_type learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles
lr_power dataloader_num_workers use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon
max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to mixed_precision
prior_generation_precision local_rank enable_xformers_memory_efficient_attention rank tracker_name is_turbo
""".split()  # noqa: SIM905


def test_every_flag_of_the_scripts_is_known():
    assert set(DIFFUSERS) <= set(ALIASES)


def test_the_readme_command_of_diffusers():
    run, notes = resolve(
        read_flags(
            [
                "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0",
                "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix",
                "--output_dir=diffusion-sdxl-dpo",
                "--mixed_precision=fp16",
                "--dataset_name=kashif/pickascore",
                "--train_batch_size=8",
                "--beta_dpo",
                "5000",
                "--gradient_accumulation_steps=2",
                "--gradient_checkpointing",
                "--use_8bit_adam",
                "--rank=8",
                "--learning_rate=1e-5",
                "--report_to=wandb",
                "--lr_scheduler=constant",
                "--lr_warmup_steps=0",
                "--max_train_steps=2000",
                "--checkpointing_steps=500",
                "--run_validation",
                "--validation_steps=50",
                "--seed=0",
            ]
        )
    )
    expected = {
        "model.path": "stabilityai/stable-diffusion-xl-base-1.0",
        "model.vae": "madebyollin/sdxl-vae-fp16-fix",
        "model.dtype": "float16",
        "model.gradient_checkpointing": True,
        "model.lora.rank": 8,
        "output": "diffusion-sdxl-dpo",
        "data.path": "kashif/pickascore",
        "training.mixed_precision": "fp16",
        "training.batch_size": 8,
        "training.accumulation": 2,
        "training.steps": 2000,
        "training.seed": 0,
        "optimizer.type": "adamw8bit",
        "optimizer.learning_rate": 1e-5,
        "optimizer.schedule": "constant",
        "logging.trackers": ("wandb",),
        "checkpoint.every": 500,
        "validation.every": 50,
    }
    assert {name: get(run, name) for name in expected} == expected
    assert run.method == {"type": "dpo", "beta": 5000.0}
    assert len(run.validation.prompts) == 4
    assert any("method.beta = 5000" in note for note in notes)


@pytest.mark.parametrize(
    ("model", "beta"),
    [
        (["--model.path", "tiny:sdxl"], 2500.0),
        (["--model.path", "tiny:sd15"], 5000.0),
        (["--pretrained_model_name_or_path", "runwayml/stable-diffusion-v1-5"], 5000.0),
        (["--model.family", "sd15", "--model.path", "mine"], 5000.0),
        (["--model.family", "sdxl", "--model.path", "runwayml/stable-diffusion-v1-5"], 2500.0),
    ],
)
def test_beta_dpo_is_doubled_where_the_script_leaves_out_the_half(model, beta):
    for argv in (["--beta_dpo", "2500", *model], [*model, "--beta_dpo=2500"]):
        run, notes = resolve(read_flags(argv))
        assert run.method["beta"] == beta
        assert notes[0].endswith(f"method.beta = {beta:g}")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--no_hflip"], "data.flip", False),
        (["--random_flip"], "data.flip", True),
        (["--random_flip", "false"], "data.flip", False),
        (["--random_crop"], "data.crop", "random"),
        (["--mixed_precision", "bf16"], "model.dtype", "bfloat16"),
        (["--bf16"], "training.mixed_precision", "bf16"),
        (["--adam_beta1", "0.5"], "optimizer.betas", (0.5, 0.999)),
        (["--adam_beta2", "0.5", "--adam_beta1", "0.4"], "optimizer.betas", (0.4, 0.5)),
        (["--report_to", "all"], "logging.trackers", ("tensorboard", "wandb")),
        (["--report_to", "none"], "logging.trackers", ()),
        (["--lr_scheduler", "constant_with_warmup"], "optimizer.schedule", "constant"),
        (["--use_adafactor"], "optimizer.type", "adafactor"),
        (["--enable_xformers_memory_efficient_attention"], "model.attention", "xformers"),
        (["--resume_from_checkpoint", "latest"], "resume", "latest"),
        (["--lora_target_modules", "to_q,to_v"], "model.lora.targets", ("to_q", "to_v")),
        (["--proportion_empty_prompts", "0.2"], "data.prompt_dropout", 0.2),
        (["--validation_prompt", 'a "red, round" cat'], "validation.prompts", ('a "red, round" cat',)),
        (["--validation_prompt", "a cat"], "validation.every", 200),
        (["--per_device_train_batch_size", "3"], "training.batch_size", 3),
        (["--max_steps=4"], "training.steps", 4),
        (["--model.compile"], "model.compile", True),
    ],
)
def test_an_alias_sets_its_field(argv, field, value):
    assert get(run_of(*argv), field) == value


@pytest.mark.parametrize(
    ("argv", "method"),
    [
        (["--loss_type", "sigmoid"], {"type": "dpo", "loss": {"type": "logistic"}}),
        (["--loss_type=ipo", "--beta", "7"], {"type": "dpo", "loss": {"type": "ipo"}, "beta": 7}),
        (["--label_smoothing", "0.1"], {"type": "dpo", "loss": {"type": "logistic", "label_smoothing": 0.1}}),
        (["--sft"], {"type": "sft"}),
    ],
)
def test_an_alias_sets_the_method(argv, method):
    from diffalign.methods import build

    assert run_of(*argv).method == method
    build(method)


@pytest.mark.parametrize("name", [n for n, a in ALIASES.items() if a.meaning.startswith("not supported")])
def test_an_unsupported_flag_says_what_to_do_instead(name):
    argv = [f"--{name}"] if ALIASES[name].switch else [f"--{name}", "1"]
    with pytest.raises(UserError, match=rf"--{name} is not supported; .{{10}}"):
        run_of(*argv)


@pytest.mark.parametrize("name", [n for n, a in ALIASES.items() if not a.meaning.startswith("not supported")])
def test_every_supported_alias_is_accepted(name):
    words = {
        "report_to": "wandb", "mixed_precision": "bf16", "loss_type": "ipo", "lr_scheduler": "cosine",
        "lr_scheduler_type": "linear", "optimizer": "AdamW", "optim": "adafactor", "adam_beta1": "0.5",
        "adam_beta2": "0.5", "lora_dropout": "0.1", "proportion_empty_prompts": "0.1",
        "label_smoothing": "0.1",        "resolution": "64", "validation_steps": "0",
    }  # fmt: skip
    assert run_of(*([f"--{name}"] if ALIASES[name].switch else [f"--{name}", words.get(name, "1")]))


def test_the_config_stands_anywhere_among_the_flags():
    for argv in (
        ["tiny_sdxl_dpo", "--model.compile", "--method.beta", "3"],
        ["--method.beta", "3", "tiny_sdxl_dpo"],
        ["--gradient_checkpointing", "tiny_sdxl_dpo", "--method.beta=3"],
        ["--model.compile", "tiny_sdxl_dpo", "--method.beta=3"],
    ):
        run = run_of(*argv)
        assert (run.model.path, run.method["beta"]) == ("tiny:sdxl", 3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rte", "1"], "did you mean --learning_rate"),
        (["--train_batch_size"], "--train_batch_size needs a value"),
        (["a.yaml", "b.yaml"], "two configs"),
        (["-x"], "options are written --name"),
        (["--loss_type", "cpo"], "unknown value of --loss_type 'cpo'"),
        (["--lr_scheduler", "polynomial"], "unknown value of --lr_scheduler 'polynomial'"),
        (["--report_to", "comet_ml"], "unknown tracker"),
        (["--beta_dpo", "high"], "--beta_dpo='high'"),
        (["--no_hflip=perhaps"], "after a switch"),
    ],
)
def test_bad_flags(argv, words):
    with pytest.raises(UserError) as caught:
        run_of(*argv)
    assert words in str(caught.value)
