import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from torch.nn.attention import SDPBackend
from torch.testing import assert_close

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.models import attention
from diffalign.models.attention import (
    BACKENDS,
    DISPATCHED,
    NATIVE,
    Calls,
    OneBackend,
    attentions,
    available,
    check_masks,
    head_dims,
    kernel_of,
    set_attention,
    why_not,
)
from diffalign.models.families.registry import get_family, having
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import prepare_policy
from tests.models.conftest import MAKERS
from tests.models.inputs import conditions, random_inputs, states, states_of
from tests.video_pipelines import CASES


def kernels(calls: Calls) -> set[str]:
    """Which kernels ran; the matrix products of other layers are no sign of the math back-end."""
    fused = {kernel_of([name]) for name in calls.names if "scaled_dot_product" in name}
    softmax = any("_softmax" in name for name in calls.names)
    return fused | ({"math"} if softmax else set())


def run(model: LoadedModel) -> tuple[Calls, Calls, torch.Tensor]:
    x_t, t = states_of(model)
    cond = conditions(model, ["a", "b"])
    with Calls() as forward:
        prediction = model.denoiser()(x_t, t, cond)
    with Calls() as backward:
        prediction.square().sum().backward()
    return forward, backward, prediction.detach()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["flash", "math"])
@pytest.mark.parametrize(
    "family", ["sdxl", "sd3", "flux", "pixart", "z_image", "flux2_klein", "qwen_image", "chroma", "lumina2"]
)
def test_the_chosen_kernel_runs_forward_backward_and_in_recomputation(
    folders: dict[str, Path], family: str, name: str, checkpointing: bool
) -> None:
    config = ModelConfig(path=str(folders[family]), attention=name, gradient_checkpointing=checkpointing)
    model = load(config)
    prepare_policy(model, config)
    forward, backward, _ = run(model)
    assert kernels(forward) == {name}
    assert not kernels(backward) & {"flash", "math"} - {name}
    recomputed = [
        n for n in backward.names if "flash_attention_for_cpu.default" in n or "_softmax.default" in n
    ]
    assert bool(recomputed) == checkpointing


def test_auto_leaves_the_choice_to_torch(sdxl: LoadedModel) -> None:
    processors = dict(sdxl.pipeline.unet.attn_processors)
    set_attention(sdxl.network, "auto", "cpu", torch.float32)
    assert sdxl.pipeline.unet.attn_processors == processors


def test_kernels_agree_on_the_prediction(folders: dict[str, Path]) -> None:
    predictions = []
    for name in ("flash", "math"):
        model = load(ModelConfig(path=str(folders["sdxl"]), attention=name))
        x_t, t = states()
        with torch.no_grad():
            predictions.append(model.denoiser()(x_t, t, conditions(model, ["a", "b"])))
    assert_close(*predictions)


def test_a_copy_of_the_network_keeps_its_kernel(folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(folders["sdxl"]), attention="math"))
    model.pipeline.unet = copy.deepcopy(model.pipeline.unet)
    x_t, t = states()
    cond = conditions(model, ["a", "b"])
    with Calls() as calls, torch.no_grad():
        model.denoiser()(x_t, t, cond)
    assert kernels(calls) == {"math"}


def test_what_is_available_here_is_found_out_by_running_it() -> None:
    assert available("cpu", torch.float32, [8, 40, 64]) == ["flash", "math"]
    assert why_not("flash", "cpu", torch.float32, 64) is None
    assert why_not("cudnn", "cpu", torch.float32, 64)


def test_head_widths_are_read_off_the_network(model: LoadedModel) -> None:
    assert head_dims(model.network) == [8]


@pytest.mark.parametrize(
    ("said", "raised"),
    [("No available kernel. Aborting execution.", UserError), ("out of memory", RuntimeError)],
)
def test_a_kernel_that_fails_in_the_run_is_a_user_error(said: str, raised: type[Exception]) -> None:
    def processor(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError(said)

    with pytest.raises(raised, match="allowed here: auto" if raised is UserError else said):
        OneBackend(processor, SDPBackend.FLASH_ATTENTION)(torch.nn.Identity(), torch.zeros(1))


@pytest.mark.parametrize("name", ["efficient", "cudnn", "xformers"])
def test_an_unavailable_kernel_is_a_user_error(sdxl: LoadedModel, name: str) -> None:
    with pytest.raises(
        UserError, match=f"model.attention='{name}' cannot run on cpu .* allowed here: auto, flash, math"
    ):
        set_attention(sdxl.network, name, "cpu", torch.float32)


def test_an_unknown_kernel_is_a_user_error(sdxl: LoadedModel) -> None:
    with pytest.raises(UserError, match="did you mean flash"):
        set_attention(sdxl.network, "flush", "cpu", torch.float32)


def test_diffusers_names_of_torchs_kernels_are_ours(folders: dict[str, Path]) -> None:
    assert {*NATIVE.values()} == {"auto", *BACKENDS}
    model = load(ModelConfig(path=str(folders["sdxl"]), attention="_native_math"))
    x_t, t = states_of(model)
    cond = conditions(model, ["a", "b"])
    with Calls() as calls, torch.no_grad():
        model.denoiser()(x_t, t, cond)
    assert kernels(calls) == {"math"}


def hub_kernel(called: list[torch.Size]) -> object:
    """Return a kernel of FlashAttention 3's arguments, (batch, tokens, heads, width), that runs on a CPU."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: object, **more: object):  # type: ignore[no-untyped-def]
        called.append(q.shape)
        flipped = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*flipped, scale=softmax_scale)  # type: ignore[arg-type, misc]
        return out.transpose(1, 2)

    return attend


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_kernel_of_the_hub_is_called_forward_and_in_recomputation(
    folders: dict[str, Path], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers' own dispatch, with a stand-in for what the package kernels would download."""
    called: list[torch.Size] = []
    stand_in(monkeypatch, hub_kernel(called))
    gradients, default = [], attention_dispatch._AttentionBackendRegistry.get_active_backend()
    for name in ("auto", "_flash_3_hub"):
        called.clear()
        config = ModelConfig(path=str(folders["flux"]), attention=name, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
        model = load(config)
        tried = len(called)
        parameters = prepare_policy(model, config)
        run(model)
        gradients.append([p.grad for _, p in parameters])
    layers = len(model.network.attn_processors)  # type: ignore[operator, arg-type]
    assert tried == 1 and len(called) == tried + layers * (2 if checkpointing else 1)
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == default, "others keep theirs"
    for plain, other in zip(*gradients, strict=True):
        assert_close(plain, other)


def stand_in(monkeypatch: pytest.MonkeyPatch, kernel: object) -> None:
    name = attention_dispatch.AttentionBackendName._FLASH_3_HUB
    monkeypatch.setattr(attention, "find_spec", lambda package: package)
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: True)
    monkeypatch.setattr(attention_dispatch, "is_kernels_version", lambda *bound: True)
    config = attention_dispatch._HUB_KERNELS_REGISTRY[name]
    for part in ("kernel_fn", "wrapped_forward_fn", "wrapped_backward_fn"):
        monkeypatch.setattr(config, part, kernel)


def test_a_kernel_of_the_hub_that_cannot_run_is_a_user_error(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(**arguments: object) -> None:
        raise RuntimeError("FlashAttention only supports Hopper GPUs")

    stand_in(monkeypatch, kernel)
    with pytest.raises(
        UserError, match=r"'_flash_3_hub' cannot run on cpu.*Hopper GPUs; allowed here: auto, flash"
    ):
        load(ModelConfig(path=str(folders["flux"]), attention="_flash_3_hub"))


@pytest.mark.parametrize(
    ("name", "words"), [("_flash_3_hub", "pip install kernels"), ("_flash_3", "build FlashAttention 3")]
)
def test_a_missing_package_of_a_kernel_is_told(
    folders: dict[str, Path], name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"model.attention='{name}' needs .*not installed: {words}"):
        load(ModelConfig(path=str(folders["flux"]), attention=name))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_networks_without_the_dispatcher_refuse_its_kernels(folders: dict[str, Path], family: str) -> None:
    with pytest.raises(
        UserError, match=r"attention layers of .* do not call diffusers' dispatcher; allowed here: auto"
    ):
        load(ModelConfig(path=str(folders[family]), attention="_flash_3_hub"))


@pytest.mark.parametrize("family", having("masks_attention"))
def test_flash_attention_is_refused_where_a_family_passes_masks(family: str) -> None:
    for name in DISPATCHED:
        with pytest.raises(
            UserError, match=rf"model.attention='{name}' with {family}, whose attention has a"
        ):
            check_masks(name, get_family(family))
    check_masks("auto", get_family(family))


def test_flash_attention_with_a_mask_is_refused_before_weights_are_loaded(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    with pytest.raises(UserError, match=r"model.attention='flash_hub' with qwen_image.*allowed: auto"):
        load(ModelConfig(path=str(folders["qwen_image"]), attention="flash_hub"))


@pytest.mark.parametrize("name", sorted({*MAKERS, *CASES, "ltx_i2v"}))
def test_which_families_pass_masks_is_seen(
    folders: dict[str, Path], videos: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of families that call the dispatcher, with two prompts of different lengths."""
    family = name if name in ("wan_ti2v", "ltx_i2v") else "auto"  # whose weights are stored as another's
    folder = (folders | videos)["ltx" if name == "ltx_i2v" else name]
    model = load(ModelConfig(path=str(folder), family=family))
    if any(not hasattr(layer.processor, "_attention_backend") for layer in attentions(model.network)):
        return  # the kernels of the dispatcher are refused for another reason
    x_t, cond = random_inputs(model)
    cond |= model.encode_prompts(["a", "a red circle on the left of a blue square"])
    masked = []

    def attend(*arguments: Any, **named: Any) -> torch.Tensor:
        masked.append(named.get("attn_mask") is not None or any(a is not None for a in arguments[3:4]))
        return plain(*arguments, **named)

    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attend)
    model.family.call(model.network, x_t, model.path.model_time(torch.tensor([0.3, 0.7])), cond)
    assert masked and any(masked) == model.family.masks_attention


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("kernels") is None, reason="needs a Hopper GPU and kernels"
)
def test_flash_attention_3_agrees_with_torchs(folders: dict[str, Path]) -> None:
    predictions = []
    for name in ("auto", "_flash_3_hub"):
        model = load(ModelConfig(path=str(folders["flux"]), attention=name, dtype="bfloat16"), device="cuda")  # type: ignore[arg-type]
        x_t, t = states_of(model)
        cond = {key: value.cuda() for key, value in conditions(model, ["a", "b"]).items()}
        with torch.no_grad():
            predictions.append(model.denoiser()(x_t.cuda(), t.cuda(), cond).float())
    assert_close(*predictions, atol=2e-2, rtol=2e-2)
