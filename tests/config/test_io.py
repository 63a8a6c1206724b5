"""Configurations: round trip, precedence, and error messages."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from diffalign.config.fields import options
from diffalign.config.files import find_config, read_yaml, shipped_configs
from diffalign.config.io import apply_overrides, dotted_names, from_dict, to_dict, to_yaml, typed
from diffalign.config.ranges import get
from diffalign.config.reward_schema import RewardRun
from diffalign.config.schema import LoraConfig, ModelConfig, OptimizerConfig, Run, TrainingConfig
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.losses.pairwise import Logistic
from diffalign.methods import build as build_method
from diffalign.methods.dpo import DPO
from diffalign.runs.reward.validate import validate as validate_reward
from diffalign.runs.validate import read_run, validate, validation_prompts


def write(tmp_path, text, name="config.yaml"):
    file = tmp_path / name
    file.write_text(text)
    return file


def test_defaults_round_trip(tmp_path):
    assert read_run(write(tmp_path, to_yaml(Run()))) == Run()


def test_a_changed_tree_round_trips(tmp_path):
    run = Run(
        output="runs/ünï",
        method={"type": "dpo", "beta": 1e-7, "time": {"type": "listed", "times": [0.25, 0.5]}},
        model=ModelConfig(path="a/b", lora=LoraConfig(rank=3, alpha=2.5, targets=("to_q",), dora=True)),
        training=TrainingConfig(mixed_precision="no", ema_decay=0.5),
    )
    assert read_run(write(tmp_path, to_yaml(run))) == run


def test_an_empty_file_is_the_default_run(tmp_path):
    assert read_run(write(tmp_path, "")) == Run()


def test_flags_win_and_the_last_one_most(tmp_path):
    file = write(tmp_path, "training: {steps: 7, seed: 1}")
    run = read_run(file, ["--training.steps", "8", "--training.steps=9", "--model.lora.dora"])
    assert (run.training.steps, run.training.seed, run.model.lora.dora) == (9, 1, True)


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("optimizer.learning_rate", "1e-5", 1e-5),
        ("optimizer.learning_rate", "3", 3.0),
        ("optimizer.betas", "0.5,0.6", (0.5, 0.6)),
        ("optimizer.betas", "[0.5, 0.6]", (0.5, 0.6)),
        ("model.lora.targets", "to_q, to_k", ("to_q", "to_k")),
        ("model.lora.alpha", "none", None),
        ("model.lora.alpha", "4", 4.0),
        ("model.revision", "12", "12"),
        ("training.mixed_precision", "no", "no"),
        ("data.flip", "true", True),
        ("model.gradient_checkpointing", "true", True),
        ("model.gradient_checkpointing", "2", 2),
        ("data.limit", "null", None),
        ("logging.trackers", "[]", ()),
        ("validation.prompts", '["a cat, sitting", "1e5"]', ("a cat, sitting", "1e5")),
        ("output", "2", "2"),
    ],
)
def test_a_flag_is_read_as_its_field(flag, text, value):
    assert get(apply_overrides(Run(), [f"--{flag}", text]), flag) == value
    assert get(apply_overrides(Run(), [f"--{flag}={text}"]), flag) == value


def test_yaml_that_reads_otherwise_than_meant(tmp_path):
    text = "training: {mixed_precision: no}\noptimizer: {learning_rate: 1e-5}\nmethod: {type: dpo, beta: 2e3}"
    run = read_run(write(tmp_path, text))
    assert run.training.mixed_precision == "no"
    assert run.optimizer.learning_rate == 1e-5
    assert run.method["beta"] == 2000.0


@pytest.mark.parametrize("number", ["0640", "-010", "1:30"])
def test_a_number_that_yaml_reads_to_another_base_is_refused(tmp_path, number):
    with pytest.raises(UserError, match=rf"line 2: {number}, which YAML reads to base 8"):
        read_run(write(tmp_path, f"data:\n  resolution: {number}"))
    run = read_run(
        write(tmp_path, "model: {path: tiny:sd15}\noptimizer: {learning_rate: 0.05}\noutput: '0640'")
    )
    assert (run.optimizer.learning_rate, run.output) == (0.05, "0640")


def test_a_key_with_a_dot_is_told_apart_from_an_unknown_one(tmp_path):
    with pytest.raises(UserError, match=r"has a dot, as flags have; .* nested keys, model: \{path: ...\}"):
        read_run(write(tmp_path, "model.path: tiny:sd15"))


def test_fields_of_the_method_are_set_by_flags():
    flags = ["--method.beta", "2e3", "--method.time", "{type: uniform, low: 0.3}", "--method.time.high=0.9"]
    run = apply_overrides(Run(), flags)
    time = {"type": "uniform", "low": 0.3, "high": 0.9}
    assert run.method == {"type": "dpo", "beta": 2000.0, "time": time}


def test_another_method_starts_from_its_own_defaults():
    run = Run(method={"type": "dpo", "beta": 3})
    assert apply_overrides(run, ["--method", "sft"]).method == {"type": "sft"}
    assert apply_overrides(run, ["--method.type", "sft"]).method == {"type": "sft"}
    assert apply_overrides(run, ["--method.type", "dpo"]).method == {"type": "dpo", "beta": 3}


def test_another_optimizer_keeps_the_other_settings():
    run = apply_overrides(Run(), ["--optimizer.learning_rate", "3e-4", "--optimizer.type", "adafactor"])
    assert (run.optimizer.type, run.optimizer.learning_rate) == ("adafactor", 3e-4)


def test_a_base_is_merged_key_by_key(tmp_path):
    write(tmp_path, "training: {steps: 5, seed: 6}\nmethod: {type: dpo, beta: 7}", "base.yaml")
    file = write(tmp_path, "base: base.yaml\ntraining: {steps: 8}\nmethod: {loss: hinge}")
    run = read_run(file)
    assert (run.training.steps, run.training.seed) == (8, 6)
    assert run.method == {"type": "dpo", "beta": 7, "loss": "hinge"}
    other = write(tmp_path, "base: base.yaml\nmethod: {type: sft}", "other.yaml")
    assert read_run(other).method == {"type": "sft"}


def test_recipes_are_found_by_name():
    assert find_config("tiny_sdxl_dpo") == shipped_configs()["tiny_sdxl_dpo"]
    assert find_config("configs/tiny_sdxl_dpo.yaml").name == "tiny_sdxl_dpo.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: {path: x}", ["unknown key 'modle'", "did you mean model", "config.yaml"]),
        ("model: {lora: {rnak: 4}}", ["'model.lora.rnak'", "did you mean model.lora.rank"]),
        ("training: {learning_rate: 1}", ["did you mean optimizer.learning_rate"]),
        ("training: {steps: many}", ["training.steps='many'", "a whole number"]),
        ("training: {steps: 1.5}", ["training.steps=1.5", "a whole number"]),
        ("training: {steps: true}", ["training.steps=True"]),
        ("training: 3", ["training=3"]),
        ("model: {train: lroa}", ["model.train", "lroa", "lora"]),
        ("data: {flip: 1}", ["data.flip=1", "true or false"]),
        ("optimizer: {betas: [0.1]}", ["optimizer.betas", "list of 2"]),
        ("model: {lora: {targets: to_q}}", ["model.lora.targets", "a list"]),
        ("- 1", ["holds a list"]),
        ("training:\n  steps: 1\n  steps: 2", ["line 3", "given twice"]),
        ("a: [1", ["config.yaml line", "not valid YAML"]),
        ("base: none.yaml", ["none.yaml", "`base`"]),
        ("base: config.yaml", ["include each other"]),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        read_run(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--training.stpes", "1"], ["unknown key 'training.stpes'", "did you mean training.steps"]),
        (["--training", "1"], ["is a section", "--training.steps"]),
        (["--training.steps"], ["needs a value"]),
        (["--training.steps", "x"], ["training.steps='x'", "flag --training.steps"]),
        (["nonsense"], ["unexpected 'nonsense'"]),
        (["--training.steps", 3], ["override 3 is a int; allowed: a list of texts"]),
        ("--training.steps=3", ["the text '--training.steps=3'; allowed: a list of texts"]),
    ],
)
def test_a_mistake_in_a_flag_is_named(flags, words):
    with pytest.raises(UserError) as caught:
        apply_overrides(Run(), flags)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("model.lora.rank", "0"),
        ("data.resolution", "100"),
        ("data.holdout", "1"),
        ("data.flip_labels", "1.1"),
        ("training.steps", "0"),
        ("training.batch_size", "-1"),
        ("training.ema_decay", "1"),
        ("training.spike_factor", "0.5"),
        ("optimizer.learning_rate", "0"),
        ("optimizer.learning_rate", "nan"),
        ("optimizer.betas", "0.9,1.0"),
        ("model.lora.targets", "[]"),
        ("logging.every", "0"),
        ("output", ""),
    ],
)
def test_a_value_out_of_range_is_named(flag, text):
    with pytest.raises(UserError, match=rf"{flag}=.*allowed"):
        validate(apply_overrides(Run(), [f"--{flag}={text}"]))


def test_defaults_are_valid():
    validate(Run())
    validate_reward(RewardRun())


@pytest.mark.parametrize("tree", [Run, RewardRun])
def test_every_option_has_a_help_text(tree):
    texts = {name: field.metadata.get("help", "") for name, field, _ in options(tree)}
    assert set(texts) == set(dotted_names(tree))
    assert [name for name, text in texts.items() if len(text) < 8] == []


@pytest.mark.parametrize("tree", [Run, RewardRun])
def test_every_number_has_a_range(tree):
    """All but those of which every finite value has a meaning."""
    free = {"data.altered.seed"}
    numbers = {
        name
        for name, field, kind in options(tree)
        if not {int, float}.isdisjoint({kind, *get_args(kind)}) and not field.metadata.get("rule")
    }
    assert numbers <= free


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("training.batch_size", "1e24"),
        ("training.accumulation", "1e24"),
        ("data.cache_batch_size", "99999999999999999999"),
        ("data.resolution", "8e9"),
        ("data.altered.seed", "1e24"),
        ("validation.guidance", "inf"),
        ("validation.seed", "9223372036854775808"),
        ("method.beta", ".nan"),
        ("strategies", "[{type: sft, weight: .inf}]"),
    ],
)
def test_numbers_that_no_machine_can_use_are_refused(flag, text):
    name = flag if flag != "method.beta" else "method"
    with pytest.raises(UserError, match=rf"{name}=.*allowed"):
        validate(apply_overrides(Run(), [f"--{flag}={text}"]))


def test_names_are_checked_without_torch():
    code = (
        "import sys\nfrom diffalign.runs.validate import read_run\n"
        "read_run('tiny_sdxl_dpo', needs=['data.path'])\n"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_must_be_given():
    with pytest.raises(UserError, match=r"data.path is not set.*--data.path"):
        validate(Run(), needs=["data.path"])
    with pytest.raises(UserError, match=r"validation.prompts is empty"):
        validate(replace(Run(), validation=replace(Run().validation, every=3)))


def test_every_field_of_the_tree_is_written():
    data = to_dict(Run())
    for dotted in dotted_names():
        inner = data
        for part in dotted.split("."):
            inner = inner[part]
    assert from_dict(data) == Run()


def test_a_yaml_file_without_utf8_is_named(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"x.yaml line 1: not UTF-8 text"):
        read_yaml(file)


def test_a_component_without_type_is_the_default_one():
    method = build_method({"type": "dpo", "time": {"low": 0.3}, "loss": {"label_smoothing": 0.1}})
    assert method == DPO(time=Uniform(low=0.3), loss=Logistic(label_smoothing=0.1))
    with pytest.raises(UserError, match=r"key in method\.time \(Uniform\)"):
        build_method({"type": "dpo", "time": {"lo": 0.3}})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("data.path", "s3://bucket/pairs", "aws s3 cp --recursive s3://bucket/pairs FOLDER"),
        ("data.path", "hf://datasets/me/pairs/train.parquet", "hf download --repo-type dataset me/pairs"),
        ("model.path", "hf://me/model", "give a repository as me/model"),
        ("model.path", "https://host/model.safetensors", "download it first"),
        ("output", "gs://bucket/run", "gcloud storage cp"),
    ],
)
def test_remote_addresses_are_told_what_to_do_instead(field, value, words):
    with pytest.raises(UserError) as caught:
        validate(apply_overrides(Run(), [f"--{field}={value}"]))
    assert f"{field}='{value}'" in str(caught.value) and words in str(caught.value)


def test_a_file_of_validation_prompts_is_read_and_a_missing_one_told_early(tmp_path):
    write(tmp_path, "a red circle, small\na blue square\n", "prompts.txt")
    run = apply_overrides(
        Run(), ["--validation.prompts", str(tmp_path / "prompts.txt"), "--validation.every=5"]
    )
    assert validation_prompts(run) == ["a red circle, small", "a blue square"]
    assert to_dict(run)["validation"]["prompts"] == [str(tmp_path / "prompts.txt")]
    for text in ("a photo of prompts.txt", "see readme.md"):
        assert validation_prompts(apply_overrides(Run(), ["--validation.prompts", text])) == [text]
    with pytest.raises(UserError, match=r"missing\.txt"):
        validate(apply_overrides(Run(), ["--validation.prompts", "missing.txt", "--validation.every=5"]))


HOSTILE = [
    [], {}, [1], {"a": 1}, None, True, "x", -1, 10**400, float("nan"), 1e24, [[]], {"type": []}, {"type": {}},
    {"type": None}, {"type": 3}, "\0", {1: 2},
]  # fmt: skip


def accepted(make):
    """Whether a value passes; anything but a UserError goes through."""
    try:
        make()
    except UserError:
        return False
    return True


@pytest.mark.parametrize("name", ["dpo", "smpo", "awm", "inversion_dpo"])
def test_a_wrong_kind_in_a_methods_section_is_an_error_and_no_traceback(name):
    from diffalign.methods import REGISTRY

    for field in REGISTRY[name].method.__dataclass_fields__:
        for value in HOSTILE:
            method = {"type": name, field: value}
            accepted(lambda method=method: (validate(from_dict({"method": method})), build_method(method)))
    assert not accepted(lambda: build_method({"type": name, "time": {"type": []}}))


def test_a_wrong_kind_anywhere_is_an_error_and_no_traceback():
    for dotted in dotted_names():
        *sections, leaf = dotted.split(".")
        for value in HOSTILE:
            data = {leaf: value}
            for section in reversed(sections):
                data = {section: data}
            accepted(lambda data=data: validate(from_dict(data)))
    for section in ("method", "strategies", "model", "data"):
        assert not accepted(lambda section=section: validate(from_dict({section: [[]]})))
    assert not accepted(lambda: validate(from_dict({"strategies": [{"type": []}]})))


def test_a_tree_of_python_values_becomes_that_of_yaml():
    """Sections as mappings, lists, paths, and whole numbers where numbers are."""
    run = Run(
        output=Path("runs") / "mine",
        model={"path": "m", "lora": {"rank": 4, "targets": ["to_q"]}},
        optimizer=OptimizerConfig(learning_rate=1, betas=[0.9, 0.95]),
    )
    wanted = Run(
        output="runs/mine",
        model=ModelConfig(path="m", lora=LoraConfig(rank=4, targets=("to_q",))),
        optimizer=OptimizerConfig(learning_rate=1.0, betas=(0.9, 0.95)),
    )
    assert typed(run) == wanted and to_yaml(typed(run)) == to_yaml(wanted)
    assert typed(wanted) == wanted
