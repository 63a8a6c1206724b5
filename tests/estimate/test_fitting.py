"""Options that make a run fit a GPU, and the bytes of quantised weights."""

from dataclasses import replace

import pytest
import torch

from diffalign.cli import main
from diffalign.config.schema import DataConfig, ModelConfig, Run, TextEncoderConfig, TrainingConfig
from diffalign.estimate.counting import largest, stored
from diffalign.estimate.estimate import GIB, estimate
from diffalign.estimate.fitting import Fit, fitting
from diffalign.models.loading import load
from diffalign.models.quantization import KINDS, quantizable
from diffalign.runs.micro_batch import workload_of
from diffalign.runs.validate import read_run

TINY = Run(
    model=ModelConfig(path="tiny:sdxl"),
    data=DataConfig(resolution=32),
    training=TrainingConfig(batch_size=8),
)


def held(tensor: torch.Tensor) -> int:
    """Bytes of a weight as it is stored, inner tensors of torchao's counted."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(held(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def scales(layer: torch.nn.Module) -> int:
    """Bytes of the scales that bitsandbytes keeps beside a weight."""
    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        return state.absmax.nbytes + state.state2.absmax.nbytes
    return 0 if getattr(layer.weight, "SCB", None) is None else layer.weight.SCB.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_bytes_are_those_of_the_libraries(kind):
    plain = load(ModelConfig(path="tiny:sdxl", dtype="bfloat16")).network
    names = {name for name, _ in quantizable(plain, kind)}
    told = stored(plain, kind)
    network = load(ModelConfig(path="tiny:sdxl", dtype="bfloat16", quantize=kind)).network
    found = sum(held(p) for p in network.parameters())
    found += sum(scales(module) for name, module in network.named_modules() if name in names)
    assert found == pytest.approx(told, rel=0.01)
    assert told < (0.85) * stored(plain, "none")
    widest = max(layer.weight.nbytes for _, layer in quantizable(plain, kind))
    assert largest(plain, kind) == (0 if kind == "int8" else widest)


def test_an_estimate_knows_quantised_weights_and_encoders():
    whole = replace(TINY, model=replace(TINY.model, dtype="bfloat16"))
    small = replace(
        whole, model=replace(whole.model, quantize="nf4", text_encoder=TextEncoderConfig(quantize="int8"))
    )
    before, after = estimate(workload_of(whole)), estimate(workload_of(small))
    assert after.memory["frozen weights"] < 0.85 * before.memory["frozen weights"]
    assert after.memory["activations"] == before.memory["activations"]
    assert after.encoder_memory < before.encoder_memory
    assert after.network_parameters == before.network_parameters


def test_options_are_added_until_the_card_is_large_enough():
    tries = list(fitting(workload_of(TINY), 1.0))
    assert len(tries) == 1 and tries[0].fits and tries[0].options == ()
    tries = list(fitting(workload_of(TINY), 0.5))  # less than the driver's own share: nothing helps
    assert [t.options[-1] for t in tries[1:]][:5] == [
        "--model.gradient_checkpointing 2",
        "--model.gradient_checkpointing true",
        "--training.batch_size 1 --training.accumulation 8",
        "--training.mixed_precision bf16",
        "--model.dtype bfloat16",
    ]
    assert not any(t.fits for t in tries)
    assert (
        tries[-1].options[-1] == "--model.quantize nf4" and "--model.quantize int8" not in tries[-1].options
    )
    assert not any("2" in option for option in tries[-1].options if "checkpointing" in option)
    training = [t.estimate.total_memory for t in tries]
    assert training[-1] < training[0] / 2 and tries[-1].estimate.pairs_per_step == 8


def test_moments_of_all_weights_are_kept_in_8_bits_and_then_paged():
    """SD 1.5 at 64 px with everything else set: what is left is 860 million weights with two moments each."""
    run = read_run("sd15_dpo", ["--optimizer.type=adamw", "--data.resolution=64", "--training.batch_size=1"])
    frugal = replace(run.model, gradient_checkpointing=True, offload_activations=True, dtype="bfloat16")
    bf16 = replace(run.training, mixed_precision="bf16")
    work = workload_of(replace(run, model=frugal, training=bf16))
    tries = list(fitting(work, 10))
    assert [t.options for t in tries] == [
        (), ("--optimizer.type adamw8bit",), ("--optimizer.type paged_adamw8bit",)
    ]  # fmt: skip
    parameters = tries[0].estimate.trainable_parameters
    adamw, small, paged = (t.estimate for t in tries)
    assert adamw.memory["optimizer state (adamw)"] == 8 * parameters
    assert small.memory["optimizer state (adamw8bit)"] == pytest.approx(2 * parameters, rel=0.03)
    assert paged.paged == pytest.approx(2 * parameters, rel=0.01) and not small.paged
    assert adamw.total_memory - small.total_memory == pytest.approx(6 * parameters, rel=0.01)
    spread = list(fitting(replace(work, training=replace(bf16, shard="full")), 10))
    assert len(spread) == 1 and not spread[0].fits, "sharded moments are those of adamw"


def test_an_optimizer_that_saves_nothing_is_not_tried():
    """LoRA's moments are a small part, and the tiny model's tensors too small for 8 bits or pages."""
    assert not any("optimizer" in o for t in fitting(workload_of(TINY), 0.5) for o in t.options)


def test_what_is_needed_by_hand():
    result = estimate(workload_of(TINY))
    peak = max(result.total_memory, result.encoder_memory)
    assert Fit((), result, 1.0).needed == pytest.approx(1.1 * peak / GIB + 0.6)


@pytest.mark.parametrize(
    ("card", "code", "words"), [("1", 0, "fits 1 GiB as it is"), ("0.5", 1, "does not fit 0.5 GiB")]
)
def test_the_command_says_which(capsys, card, code, words):
    assert main(["estimate", "tiny_sdxl_dpo", "--fits", card]) == code
    assert words in capsys.readouterr().out
