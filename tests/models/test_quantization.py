"""A frozen base in 4 or 8 bits under float32 adapters: how far from bfloat16, and equal to its reference."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from diffalign.cli import main
from diffalign.config.io import to_yaml
from diffalign.config.schema import (
    LoraConfig,
    ModelConfig,
    Run,
    TextEncoderConfig,
    TextLoraConfig,
    TrainingConfig,
)
from diffalign.diffusion.randomness import Streams
from diffalign.errors import UserError
from diffalign.export.aligned import save_aligned
from diffalign.methods import build
from diffalign.models.loading import load
from diffalign.models.lora import policy_denoiser, prepare_policy, reference_denoiser
from diffalign.models.quantization import KINDS, quantizable, quantize, stored_bytes
from diffalign.runs.align import align
from diffalign.runs.load_pipeline import named, open_model
from diffalign.runs.resume import model_content
from diffalign.runs.role_checks import check_roles
from diffalign.types import Batch
from tests.models.inputs import conditions, states_of
from tests.runs.test_align import small

DISTANCE = {
    "nf4": (0.05, 0.97),
    "int8": (0.02, 0.99),
    "torchao_int8": (0.02, 0.99),
    "torchao_float8": (0.02, 0.98),
}
"""By kind: how far the prediction may be from bfloat16's, relative, and the least cosine of the gradients."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Net(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Linear(64, 64), nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def net(kind="none"):
    torch.manual_seed(0)
    network = Net().to(torch.bfloat16).requires_grad_(False).train()
    if kind != "none":
        quantize(network, kind, "cpu", torch.bfloat16, "model.quantize")
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_only_layers_of_blocks_are_quantised_and_nothing_of_them_is_kept_for_the_backward(kind):
    plain, network = net(), net(kind)
    names = {name for name, _ in quantizable(plain, kind)}
    assert names == {f"blocks.{i}.{part}" for i in range(2) for part in ("up", "down")}
    assert type(network.first) is nn.Linear and network.first.weight.dtype == torch.bfloat16
    held = {
        p.untyped_storage().data_ptr() for p in network.parameters() if not hasattr(p, "__tensor_flatten__")
    }
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if not hasattr(tensor, "__tensor_flatten__") and storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(x)
    assert sum(saved.values()) == 2 * 8 * 128 * 2  # the input of silu, and no weight made whole
    out.float().square().sum().backward()
    gradient, x.grad = x.grad, None
    expected = plain(x)
    expected.float().square().sum().backward()
    far, cosine = DISTANCE[kind]
    assert 0 < float(((out - expected).norm() / expected.norm()).detach()) < far
    assert torch.cosine_similarity(gradient.flatten().float(), x.grad.flatten().float(), 0) > cosine


def test_nf4_leaves_rows_that_are_no_whole_blocks():
    """And what it takes is within its rounding, 0.09 of a normal weight, on every CPU."""
    network = net()
    network.blocks[1].up = nn.Linear(96, 128, dtype=torch.bfloat16)
    assert [name for name, _ in quantizable(network, "nf4")] == [
        "blocks.0.up", "blocks.0.down", "blocks.1.down",
    ]  # fmt: skip
    assert len(list(quantizable(network, "int8"))) == 4
    whole = network.blocks[0].up.weight.float()
    quantize(network, "nf4", "cpu", torch.bfloat16, "model.quantize")
    layer = network.blocks[0].up
    with torch.no_grad():
        columns = layer(torch.eye(64, dtype=torch.bfloat16)).float() - layer.bias.float()
    assert 0.05 < float((columns.T - whole).norm() / whole.norm()) < 0.12


def test_no_gradients_first_does_not_lose_them_later():
    """Sampled in eval mode, then trained: the gradient of the input is the same as without the sampling."""
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    expected = torch.autograd.grad(net("nf4")(x).float().sum(), x)[0]
    network = net("nf4").eval()
    with torch.no_grad():
        network(x.detach())
    torch.testing.assert_close(torch.autograd.grad(network.train()(x).float().sum(), x)[0], expected)


def test_stored_bytes_by_hand():
    layer = nn.Linear(128, 64, dtype=torch.bfloat16)  # 8192 weights, 64 rows
    assert (
        stored_bytes(layer, "nf4") == 4096 + 128 + 4
    )  # 128 scales of 1 byte, one of 4 for up to 256 of them
    assert stored_bytes(layer, "int8") == stored_bytes(layer, "torchao_float8") == 8192 + 4 * 64
    assert stored_bytes(layer, "torchao_int8") == 8192 + 2 * 64


def step(kind):
    """Return the first step's loss and margin, and prediction and gradients of adapters that are not zero."""
    config = ModelConfig(path="tiny:sdxl", dtype="bfloat16", quantize=kind, lora=LoraConfig(rank=4))
    model = load(config, compute=torch.bfloat16)
    parameters = prepare_policy(model, config)
    policy = policy_denoiser(model, config)
    reference = reference_denoiser(model, policy, config)
    sizes = torch.full((4, 2), 32.0)
    cond = {
        **model.encode_prompts(["a small red circle"] * 4),
        **model.micro_conditions(sizes, 0 * sizes, sizes),
    }
    x = torch.randn(4, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))
    batch = Batch(x, cond, torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    method = build({"type": "dpo", "beta": 100.0})
    with torch.autocast("cpu", torch.bfloat16):
        first = method(policy, reference, batch, Streams.at(0, 0, 2))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in parameters:
                if "lora_B" in name:
                    parameter.copy_(0.02 * torch.randn(parameter.shape))
        second = method(policy, reference, batch, Streams.at(0, 0, 2))
        with torch.no_grad():
            prediction = policy(x, torch.full((4,), 0.5), cond).float()
    second.loss.backward()
    assert all(p.dtype == torch.float32 for _, p in parameters)
    gradient = torch.cat([p.grad.flatten() for _, p in parameters])
    return first, prediction, gradient


@pytest.fixture(scope="module")
def plain():
    return step("none")


@pytest.mark.parametrize("kind", KINDS)
def test_policy_is_its_reference_and_near_bfloat16(kind, plain):
    first, prediction, gradient = step(kind)
    assert float(first.metrics["rewards/margins"]) == 0.0
    assert float(first.loss.detach()) == pytest.approx(0.6931472, abs=1e-7)
    far, cosine = DISTANCE[kind]
    assert 0 < float((prediction - plain[1]).norm() / plain[1].norm()) < far
    assert torch.cosine_similarity(gradient, plain[2], 0) > cosine


def test_a_run_over_4_bits_leaves_a_lora_and_has_another_content(tmp_path):
    lines: list[str] = []
    run = small(tmp_path / "run", steps=2)
    run = replace(
        run,
        model=replace(
            run.model, dtype="bfloat16", quantize="nf4", text_encoder=TextEncoderConfig(quantize="int8")
        ),
        data=replace(run.data, limit=8, holdout=0.0),
        training=replace(run.training, batch_size=2, mixed_precision="bf16"),
    )
    result = align(run, lines.append)
    assert result.steps == 2 and (result.aligned / "pytorch_lora_weights.safetensors").is_file()
    contents = {
        model_content(load(replace(run.model, quantize=kind))) for kind in ("none", "nf4", "torchao_int8")
    }
    assert len(contents) == 3, "a checkpoint over 4 bits does not go on over 16"


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (
            Run(model=ModelConfig(quantize="nf4", train="full")),
            "model.train='full' with model.quantize=nf4; allowed: 'lora'",
        ),
        (Run(model=ModelConfig(quantize="int8", lora=LoraConfig(dora=True))), "model.lora.dora=True"),
        (
            Run(model=ModelConfig(quantize="int8"), training=TrainingConfig(shard="full")),
            "training.shard='full'",
        ),
        (
            Run(model=ModelConfig(text_encoder=TextEncoderConfig(TextLoraConfig(rank=4), "nf4"))),
            "text_encoder.lora.rank=4 with model.text_encoder.quantize=nf4",
        ),
    ],
)
def test_what_cannot_be_is_refused(run, words):
    with pytest.raises(UserError, match=words):
        check_roles(run, build(run.method))


def test_names_and_packages_are_told(monkeypatch):
    with pytest.raises(UserError, match=r"model.quantize.*'int4'.*allowed.*nf4"):
        quantize(net(), "int4", "cpu", torch.bfloat16, "model.quantize")
    with pytest.raises(UserError, match="Linear has no layers to quantise; allowed: none"):
        quantize(nn.Linear(2, 2), "nf4", "cpu", torch.bfloat16, "model.quantize")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"model.quantize=nf4 needs bitsandbytes.*pip install bitsandbytes"):
        quantize(net(), "nf4", "cpu", torch.bfloat16, "model.quantize")


@pytest.mark.parametrize("kind", ["nf4", "torchao_int8"])
def test_a_run_is_opened_over_the_weights_that_it_was_trained_over(kind, tmp_path, capsys):
    config = ModelConfig(path="tiny:sdxl", quantize=kind, lora=LoraConfig(rank=4))
    model = load(config)
    for name, parameter in prepare_policy(model, config):
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    run = tmp_path / "run"
    save_aligned(model, run / "aligned", "")
    (run / "config.yaml").write_text(to_yaml(replace(small(run), model=config)))
    x, t = states_of(model)
    cond = conditions(model, ["a red circle"] * 2)
    with torch.no_grad():
        trained = policy_denoiser(model, config)(x, t, cond)
        same = open_model(str(run), None, "cpu", None, kind).denoiser()(x, t, cond)
        whole = open_model(str(run), None, "cpu").denoiser()(x, t, cond)
    torch.testing.assert_close(same, trained, atol=1e-4, rtol=1e-3)
    assert (whole - trained).norm() > 3 * (same - trained).norm()

    flags = ["--prompts", "tiny:test", "--limit", "1", "--steps", "1", "--output", str(tmp_path / "images")]
    flags += ["--height", "32", "--width", "32"]
    assert main(["generate", str(run), *flags]) == 0
    assert f"--quantize {kind} opens it as in training" in capsys.readouterr().err
    assert main(["generate", str(run), *flags, "--quantize", kind, "--seed", "1"]) == 0
    assert "as in training" not in capsys.readouterr().err


def test_what_is_not_quantised_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--quantize.*'nf5'.*nf4"):
        named("tiny:sdxl", quantize="nf5")
    assert named("tiny:sdxl", quantize="nf4").model.quantize == "nf4"
    run = tmp_path / "run"
    (run / "checkpoints" / "step-2").mkdir(parents=True)
    (run / "config.yaml").write_text(
        to_yaml(replace(small(run), model=ModelConfig("tiny:sdxl", train="full")))
    )
    for name in ("trainable.safetensors", "state.json"):
        (run / "checkpoints" / "step-2" / name).write_text("{}")
    with pytest.raises(UserError, match=r"--quantize nf4 with .* a checkpoint of all weights"):
        named(str(run / "checkpoints" / "step-2"), quantize="nf4")
    words = ["--prompts", "tiny:test", "--quantize", "nf4", "--negative-model", "tiny:sdxl"]
    assert main(["generate", "tiny:sdxl", *words]) == 2
