"""Flags of other tools become fields of the tree, or an error that says what to do instead."""

import re

import pytest

from diffalign.cli import main
from diffalign.cli.aliases import ALIASES
from diffalign.cli.flags import read_flags, resolve
from diffalign.config.ranges import get
from diffalign.errors import UserError

WORDS = {
    "report_to": "wandb", "mixed_precision": "bf16", "loss_type": "ipo", "lr_scheduler": "polynomial",
    "lr_scheduler_type": "linear", "optimizer": "AdamW", "optim": "adafactor", "adam_beta1": "0.5",
    "adam_beta2": "0.5", "lora_dropout": "0.1", "proportion_empty_prompts": "0.1",
    "label_smoothing": "0.1", "resolution": "64", "validation_steps": "0", "choice_model": "hps",
    "f_divergence_type": "js_divergence",
}  # fmt: skip
"""Values of the flags that do not take 1."""


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


# Those of SalesforceAIResearch/DiffusionDPO's train.py.
SALESFORCE = """
input_perturbation pretrained_model_name_or_path revision dataset_name dataset_config_name train_data_dir
image_column caption_column max_train_samples output_dir cache_dir seed resolution random_crop no_hflip
train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing
learning_rate scale_lr lr_scheduler lr_warmup_steps use_adafactor allow_tf32 dataloader_num_workers adam_beta1
adam_beta2 adam_weight_decay adam_epsilon max_grad_norm hub_model_id logging_dir mixed_precision report_to
local_rank checkpointing_steps resume_from_checkpoint noise_offset tracker_project_name
pretrained_vae_model_name_or_path sdxl sft beta_dpo hard_skip_resume unet_init proportion_empty_prompts split
choice_model dreamlike_pairs_only
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", [*DIFFUSERS, *SALESFORCE])
def test_every_flag_of_the_scripts_has_an_effect_a_note_or_a_refusal(name):
    alias = ALIASES[name]
    try:
        pairs = alias.convert("" if alias.switch else WORDS.get(name, "1"))
    except UserError as error:
        assert alias.meaning.startswith("not supported: ") and "; " in str(error)  # noqa: PT017
        return
    assert pairs or alias.note


def test_flags_that_are_one_scripts_own_are_so_marked():
    for name, alias in ALIASES.items():
        scripts = {s for s, names in (("diffusers", DIFFUSERS), ("salesforce", SALESFORCE)) if name in names}
        assert not alias.script or scripts <= {alias.script}, name


XL = ["--pretrained_model_name_or_path", "stabilityai/stable-diffusion-xl-base-1.0", "--dataset_name", "x"]
SD = ["--pretrained_model_name_or_path", "runwayml/stable-diffusion-v1-5", "--dataset_name", "x"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            [*XL, "--rank=8"],  # the defaults of train_diffusion_dpo_sdxl.py
            {
                "data.resolution": 1024, "data.split": "validation", "data.flip": True, "model.train": "lora",
                "model.lora.rank": 8, "training.epochs": 1, "optimizer.learning_rate": 5e-4,
                "optimizer.schedule": "constant",
                "optimizer.warmup_steps": 0, "training.batch_size": 4, "checkpoint.limit": 0,
                "method": {"type": "dpo", "beta": 5000},
            },
        ),
        (
            [*SD, "--rank=4", "--max_train_steps=7"],
            {"training.steps": 7, "training.epochs": None},
        ),
        ([*SD, "--rank=4", "--num_train_epochs=2"], {"training.epochs": 2}),
        ([*SD, "--sdxl", "--num_train_epochs=2"], {"training.epochs": None, "training.steps": 2000}),
        (
            [*SD, "--run_validation"],  # of train_diffusion_dpo.py, whose 2500 has no 1/2
            {
                "data.resolution": 512, "data.split": "validation", "model.lora.rank": 4,
                "validation.guidance": 7.5, "validation.every": 200, "method": {"type": "dpo", "beta": 5000},
            },
        ),
        (
            [*SD, "--rank=4", "--lr_scheduler=constant_with_warmup"],
            {"optimizer.schedule": "constant", "optimizer.warmup_steps": 500},
        ),
        (
            [*XL, "--sdxl", "--no_hflip"],  # of Salesforce's train.py
            {
                "data.resolution": 1024, "data.split": "train", "data.flip": False,
                "data.prompt_dropout": 0.2,
                "model.train": "full", "model.family": "sdxl", "model.gradient_checkpointing": True,
                "optimizer.type": "adafactor", "optimizer.learning_rate": 1e-8,
                "optimizer.warmup_steps": 500, "training.steps": 2000, "training.mixed_precision": "fp16",
            },
        ),
        (
            [*SD, "--flags", "salesforce", "--beta_dpo", "2000", "--resolution", "256"],
            {"data.resolution": 256, "optimizer.type": "adamw", "method": {"type": "dpo", "beta": 2000}},
        ),
        (
            ["--model_name_or_path", "tiny:sdxl", "--dataset_name", "x", "--max_steps", "3"],
            {
                "training.seed": 42, "training.batch_size": 8, "optimizer.schedule": "linear",
                "optimizer.weight_decay": 0.0, "training.steps": 3,
            },
        ),
        ([*SD, "--sft"], {"method": {"type": "sft"}, "model.train": "full"}),
        ([*SD, "--rank=4", "--flags", "none"], {"data.split": "train", "data.flip": False}),
        (["tiny_sdxl_dpo", *SD, "--rank=4"], {"data.split": "train", "data.resolution": 32}),
        # An embedded set has no splits.
        (["tiny_sdxl_dpo", "--flags", "diffusers"], {"data.split": "train", "data.resolution": 32}),
        (["--model.path", "tiny:sdxl", "--rank", "4"], {"data.split": "train", "data.resolution": 512}),
    ],
)  # fmt: skip
def test_a_script_gives_its_defaults(argv, expected):
    run = run_of(*argv)
    assert {name: get(run, name) for name in expected} == expected


def test_defaults_and_what_still_differs_are_told_once():
    _, notes = resolve(read_flags([*XL, "--rank=8", "--push_to_hub", "--push_to_hub"]))
    assert len([n for n in notes if "what still differs" in n]) == 1
    assert len([n for n in notes if n.startswith("--push_to_hub has no effect: ")]) == 1
    assert any("--rank is its own" in note for note in notes)
    assert any("data.resolution 1024" in note and "data.split validation" in note for note in notes)
    _, notes = resolve(read_flags([*SD, "--train_batch_size", "1"]))
    assert ["no flag is one script's own" in note for note in notes] == [True]
    _, notes = resolve(read_flags([*SD, "--rank", "1", "--sdxl"]))
    assert ["flags are of several scripts (--rank: diffusers; --sdxl: salesforce)" in n for n in notes] == [
        True
    ]
    with pytest.raises(UserError, match=r"unknown value of --flags 'kohya'; allowed: diffusers, none"):
        run_of(*SD, "--flags", "kohya")


def test_the_launchers_of_diffusion_dpo():
    """launchers/sd15.sh has no flag of its own: beta has the paper's 1/2, and a note tells how to choose."""
    run, notes = resolve(
        read_flags(
            [
                *SD,
                "--train_batch_size=1",
                "--gradient_accumulation_steps=128",
                "--beta_dpo",
                "5000",
                "--lr_scheduler=constant_with_warmup",
                "--lr_warmup_steps=500",
                "--learning_rate=1e-8",
                "--scale_lr",
            ]
        )
    )
    assert run.method["beta"] == 5000
    assert any("--flags salesforce" in note for note in notes)
    assert any("would make it 10000" in note for note in notes)


@pytest.mark.parametrize("flag", ["--train_text_encoder", "--do_edm_style_training", "--nonsense"])
def test_an_unknown_switch_is_unknown(flag):
    with pytest.raises(UserError, match=rf"unknown option '{flag}'.*allowed: "):
        run_of("--model.path", "tiny:sd15", flag)


def test_a_config_is_given_by_a_flag_too():
    for argv in (
        ["--config", "tiny_sdxl_dpo", "--method.beta=3"],
        ["--method.beta=3", "--config=tiny_sdxl_dpo"],
    ):
        run = run_of(*argv)
        assert (run.model.path, run.method["beta"]) == ("tiny:sdxl", 3)
    with pytest.raises(UserError, match="two configs"):
        run_of("tiny_sdxl_dpo", "--config", "tiny_sdxl_sft")


@pytest.mark.parametrize(
    ("argv", "prompts"),
    [
        (["--validation.prompts", "a red car, in the snow, 4k"], ("a red car, in the snow, 4k",)),
        (["--validation.prompts", "[a] beside (b), c"], ("[a] beside (b), c",)),
        (["--validation.prompts", '["a, b", c]'], ("a, b", "c")),
        (["--validation_prompts", "a, b", "c, d", "--training.steps", "1"], ("a, b", "c, d")),
        (["--validation_prompt=a, b", "--validation_prompt", "c"], ("a, b", "c")),
        (["--validation.prompts", "yes: a {b}, c"], ("yes: a {b}, c",)),
    ],
)
def test_texts_are_never_split_at_commas(argv, prompts):
    assert run_of(*argv).validation.prompts == prompts


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
    ("argv", "beta"),
    [
        (["--model.path", "tiny:sdxl"], 2500.0),
        (["--model.path", "tiny:sd15"], 2500.0),
        (["--model.path", "tiny:sdxl", "--flags", "diffusers"], 2500.0),
        (["--model.path", "tiny:sd15", "--flags", "diffusers"], 5000.0),
        (["--pretrained_model_name_or_path", "runwayml/stable-diffusion-v1-5", "--rank=4"], 5000.0),
        (["--pretrained_model_name_or_path", "runwayml/stable-diffusion-v1-5", "--sft=false"], 2500.0),
        (["--pretrained_model_name_or_path", "me/my-sdxl", "--rank=4"], 2500.0),
        (["--pretrained_model_name_or_path", "me/mine", "--rank=4"], 5000.0),
        (["--model.family", "sd15", "--model.path", "mine", "--flags=diffusers"], 5000.0),
        (["--model.family", "sdxl", "--model.path", "mine", "--flags=diffusers"], 2500.0),
    ],
)
def test_beta_dpo_is_doubled_where_the_script_leaves_out_the_half(argv, beta):
    for words in (["--beta_dpo", "2500", *argv], [*argv, "--beta_dpo=2500"]):
        run, notes = resolve(read_flags(words))
        assert run.method["beta"] == beta
        assert any(f"method.beta = {beta:g}" in note for note in notes)


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
        (["--lr_scheduler", "polynomial", "--lr_power", "2"], "optimizer.power", 2.0),
        (["--lr_num_cycles", "3"], "optimizer.cycles", 3),
        (["--lr_scheduler=constant", "--lr_warmup_steps=500"], "optimizer.warmup_steps", 0),
        (["--choice_model", "hps"], "data.rewards", ("hpsv2",)),
        (["--choice_model", "aes"], "data.rewards_as", "score"),
        (["--sync_ref_model"], "training.reference_every", 512),
        (["--sync_ref_model", "--ref_model_sync_steps", "9"], "training.reference_every", 9),
        (["--sync_ref_model"], "training.reference_mix", 0.6),
        (["--use_adafactor"], "optimizer.type", "adafactor"),
        (["--enable_xformers_memory_efficient_attention"], "model.attention", "xformers"),
        (["--resume_from_checkpoint", "latest"], "resume", "latest"),
        (["--resume_from_checkpoint", "True"], "resume", "latest"),
        (["--lora_target_modules", "to_q,to_v"], "model.lora.targets", ("to_q", "to_v")),
        (["--lora_target_modules", "to_q", "to_v"], "model.lora.targets", ("to_q", "to_v")),
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
        (
            ["--label_smoothing", "0.2", "--loss_type", "robust"],
            {"type": "dpo", "loss": {"type": "robust", "label_noise": 0.2}},
        ),
        (["--sft"], {"type": "sft"}),
        (
            ["--f_divergence_type", "js_divergence"],
            {"type": "fdpo", "divergence": {"type": "jensen_shannon"}},
        ),
        (["--f_divergence_type", "reverse_kl"], {"type": "dpo"}),
        (
            ["--input_perturbation", "0.1"],
            {"type": "dpo", "noising": {"type": "forward", "input_perturbation": 0.1}},
        ),
        (["--input_perturbation", "0"], {"type": "dpo"}),
        (["--is_turbo"], {"type": "dpo", "time": {"type": "listed", "times": [0.249, 0.499, 0.749, 0.999]}}),
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
    assert run_of(*([f"--{name}"] if ALIASES[name].switch else [f"--{name}", WORDS.get(name, "1")]))


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
    ("argv", "every"),
    [([], True), (["true"], True), (["false"], False), (["2"], 2), (["tiny_sdxl_dpo"], True)],
)
def test_a_switch_that_takes_a_number(argv, every):
    config = ["--config", "tiny_sdxl_dpo"] if "tiny_sdxl_dpo" not in argv else []
    run = run_of("--model.gradient_checkpointing", *argv, "--model.compile", *config)
    assert run.model.gradient_checkpointing is every or run.model.gradient_checkpointing == every == 2
    assert run.model.path == "tiny:sdxl"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rte", "1"], "did you mean --learning_rate"),
        (["--train_batch_size"], "--train_batch_size needs a value"),
        (["a.yaml", "b.yaml"], "two configs"),
        (["-x"], "options are written --name"),
        (["\u2014seed", "3"], "a dash of a word processor; options are written with two hyphens, --seed"),
        (["tiny_sdxl_dpo", "\u2013-seed", "3"], "two hyphens, --seed"),
        (["--method", "DPO"], "did you mean dpo or"),
        (["--loss_type", "cpo"], "unknown value of --loss_type 'cpo'"),
        (["--lr_scheduler", "step"], "unknown value of --lr_scheduler 'step'"),
        (["--choice_model", "mine"], "unknown value of --choice_model 'mine'"),
        (["--report_to", "comet_ml"], "unknown tracker"),
        (["--beta_dpo", "high"], "--beta_dpo='high'"),
        (["--no_hflip=perhaps"], "after a switch"),
        (["--loss_type", "hinge", "--label_smoothing", "0.1"], "with the loss hinge, which has none"),
    ],
)
def test_bad_flags(argv, words):
    with pytest.raises(UserError) as caught:
        run_of(*argv)
    assert words in str(caught.value)


def test_the_scripts_split_is_that_of_hub_sets(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    words = ("--flags", "diffusers", "--pretrained_model_name_or_path", "tiny:sd15", "--dataset_name")
    assert run_of(*words, "kashif/pickascore").data.split == "validation"
    assert run_of(*words, str(tmp_path / "pairs.jsonl")).data.split == "train"
    assert run_of(*words, "tiny:pairs").data.split == "train"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "train_batch_size: 2\nrank: 4\nmodel: {path: tiny:sd15}",
            "train_batch_size (training.batch_size), rank (model.lora.rank); allowed in YAML: the names "
            "here, nested by section, such as training: {batch_size: ...}; or the flag, --train_batch_size",
        ),
        ("rank: 4", "such as model: {lora: {rank: ...}}; or the flag, --rank"),
        ("output_dir: o", "such as output: ...; or the flag"),
        ("training: {max_train_steps: 3}", "training.max_train_steps (training.steps)"),
        ("mixed_precision: bf16", "mixed_precision (training.mixed_precision and model.dtype"),
        ("push_to_hub: true", "push_to_hub (no effect: nothing is uploaded"),
        ("beta_dpo: 5000", "beta_dpo (method.beta, in the unit that --help tells)"),
    ],
)
def test_flags_of_scripts_as_keys_are_told_their_places(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        run_of(str(tmp_path / "mine.yaml"))


def test_names_of_the_tree_that_scripts_have_too_are_keys(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {path: tiny:sd15, revision: x}\ntraining: {seed: 3}")
    run = run_of(str(tmp_path / "mine.yaml"))
    assert (run.model.revision, run.training.seed) == ("x", 3)


@pytest.mark.parametrize(
    ("argv", "note"),
    [
        (
            ["--bf16", "--fp16"],
            "training.mixed_precision is given more than once: --bf16 bf16; --fp16 fp16, the last, holds",
        ),
        (
            ["--rank", "4", "--model.lora.rank", "8"],
            "model.lora.rank is given more than once: --rank 4; --model.lora.rank 8, the last, holds",
        ),
        (
            ["--beta_dpo", "1", "--beta_dpo", "2", "--beta_dpo", "2"],
            "beta_dpo is given more than once: --beta_dpo 1; --beta_dpo 2, the last, holds",
        ),
    ],
)
def test_a_field_with_two_values_is_told(argv, note):
    assert note in resolve(read_flags(argv))[1]


def test_equal_values_and_several_prompts_are_no_conflict():
    argv = ["--rank", "4", "--model.lora.rank=4", "--validation_prompt", "a", "--validation_prompt", "b"]
    assert not [note for note in resolve(read_flags(argv))[1] if "more than once" in note]


def test_ipo_of_a_script_is_told_apart():
    argv = ["--flags", "diffusers", "--pretrained_model_name_or_path", "tiny:sd15", "--loss_type", "ipo"]
    assert any(n.startswith("the loss ipo is (beta h - 1/2)^2") for n in resolve(read_flags(argv))[1])
    assert not any("ipo" in note for note in resolve(read_flags(argv[:-2]))[1])


def test_notes_are_printed_beside_the_configuration(capsys):
    assert main(["train", "--model.path", "tiny:sd15", "--bf16", "--fp16", "--print-config"]) == 0
    shown = capsys.readouterr()
    assert "note: model.dtype is given more than once" in shown.err and "note:" not in shown.out
