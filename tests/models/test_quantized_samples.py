"""`--quantize` of `generate` and `evaluate`: samples of quantised weights are never taken for others."""

import json

import pytest

from diffalign.cli import main
from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.evaluation.drawing.pipeline import fingerprint
from diffalign.export.aligned import save_aligned
from diffalign.models.loading import load
from diffalign.models.lora import prepare_policy
from diffalign.models.quantization import KINDS
from diffalign.runs.load_pipeline import open_model

DRAW = ["--prompts", "tiny:test", "--limit", "1", "--steps", "1", "--height", "32", "--width", "32"]


def digest(kind):
    return fingerprint(open_model("tiny:sdxl", None, "cpu", None, None if kind == "none" else kind).pipeline)


def test_each_kind_has_its_own_samples():
    kinds = ("none", *KINDS)
    first = [digest(kind) for kind in kinds]
    assert len(set(first)) == len(kinds)
    assert [digest(kind) for kind in kinds] == first, "a second call goes on with the samples of the first"


@pytest.fixture
def lora(tmp_path):
    config = ModelConfig(path="tiny:sdxl", lora=LoraConfig(rank=4))
    model = load(config)
    for name, parameter in prepare_policy(model, config):
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    save_aligned(model, tmp_path / "lora", "")
    return str(tmp_path / "lora")


def test_an_evaluation_over_quantised_weights_draws_its_own(lora, tmp_path):
    words = ["evaluate", "--base", "tiny:sdxl", "--aligned", lora, *DRAW, "--rewards", "jpeg"]
    words += ["--output", str(tmp_path / "out")]

    def drawn(*more):
        assert main([*words, *more]) == 0
        (report,) = (json.loads(file.read_text()) for file in (tmp_path / "out").glob("**/report.json"))
        folders = [tmp_path / "out" / "images" / name for name in ("base", "aligned")]
        return report, [sorted(file.name for file in folder.glob("*.png")) for folder in folders]

    told, quantised = drawn("--quantize", "torchao_int8")
    assert "torchao_int8" in json.dumps(told)
    told, both = drawn()
    assert "torchao_int8" not in json.dumps(told)
    for some, all_of_them in zip(quantised, both, strict=True):
        assert len(some) == 1 and len(all_of_them) == 2 and set(some) < set(all_of_them)
    assert drawn("--quantize", "torchao_int8")[1] == both, "samples of the first call are used again"


def test_a_generation_over_quantised_weights_draws_its_own(tmp_path):
    for kind, count in (("torchao_int8", 1), (None, 2), ("torchao_int8", 2), ("int8", 3)):
        more = [] if kind is None else ["--quantize", kind]
        assert main(["generate", "tiny:sdxl", *DRAW, "--output", str(tmp_path), *more]) == 0
        assert len(list(tmp_path.glob("*.png"))) == count
