"""What is trained: LoRA adapters (Hu et al. 2021, arXiv 2106.09685) by peft, or the whole network.

rsLoRA: Kalajdzievski 2023, arXiv 2312.03732; DoRA: Liu et al. 2024, arXiv 2402.09353. Trained weights are
    float32 whatever the base is: an update of 1e-5 rounds away in bfloat16. The reference is the same network
    with its adapters passed by, or a frozen copy made before training.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.errors import UserError
from diffalign.models.activations import check_offload, offload_activations
from diffalign.models.compiling import compile_network
from diffalign.models.denoisers import AdaptersOff, NetworkDenoiser, OtherAdapter
from diffalign.models.families.base import Family
from diffalign.models.families.registry import FAMILIES
from diffalign.models.gradient_checkpointing import enable_checkpointing
from diffalign.models.loaded import LoadedModel
from diffalign.models.memory_format import set_channels_last
from diffalign.models.precision import only_errors
from diffalign.types import Denoiser

ADAPTER = "default"
REFERENCE = "reference"  # a second set, where the reference follows the policy
SECOND = "second"  # a second trained set
SAMPLER = "sampler"  # a set that follows and samples an online run's rounds


def prepare_policy(model: LoadedModel, config: ModelConfig, seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    """Make the model's network trainable in place: adapters or all of it, and how its step is computed.

    Args:
        seed: of the adapters' initial values.

    Returns:
        Names and parameters to train, all float32.

    Raises:
        UserError: a LoRA target that matches no module, or a setting that the network or the device has no
            use for.
    """
    network: Any = model.network
    network.requires_grad_(False)
    if config.train == "lora":
        add_lora(network, config.lora, seed)
    else:
        with only_errors("diffusers"):  # it advises against casting
            network.float()
        network.requires_grad_(True)
    freeze_idle(network, model.family)
    if config.channels_last:
        set_channels_last(network)
    if config.gradient_checkpointing:
        enable_checkpointing(network, every=int(config.gradient_checkpointing))
    if config.offload_activations:
        check_offload(model.device)
        offload_activations(network)
    if config.compile:
        compile_network(network)
    network.train()
    return trainable(network)


def freeze_idle(network: nn.Module, family: Family) -> None:
    """Freeze the weights that the family makes no use of, adapters on them included."""
    for name, parameter in network.named_parameters():
        if any(part in name for part in family.idle):
            parameter.requires_grad_(False)


def add_lora(network: Any, config: LoraConfig, seed: int = 0, adapter: str = ADAPTER) -> None:
    """Add float32 adapters to the modules that ``config.targets`` names; they change nothing before training.

    Raises:
        UserError: a target that matches no linear or convolutional module.
    """
    from peft import LoraConfig as PeftConfig

    if adapter == ADAPTER:  # the modules of a second set already stand inside the first
        check_targets(network, config.targets)
    if config.rank < 1:
        raise UserError(f"model.lora.rank={config.rank}; allowed: 1 or more")
    if not 0 <= config.dropout < 1:
        raise UserError(f"model.lora.dropout={config.dropout}; allowed: 0 up to 1, without 1")
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        init_lora_weights="gaussian",
        use_rslora=config.rslora,
        use_dora=config.dora,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second set is meant
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # which is not merged here
        torch.manual_seed(seed)
        inject(network, peft_config, adapter)
    for _, parameter in trainable(network):
        parameter.data = parameter.data.float()
    if config.dora:
        set_magnitudes(network, adapter)


def add_second_adapter(network: Any, config: LoraConfig, seed: int, name: str = SECOND) -> dict[str, str]:
    """Add a further trained set of adapters, which starts from other values; the first stays the active one.

    Returns:
        The names of the first set's parameters, each with that of its fellow in the new set.
    """
    before = [name for name, _ in trainable(network)]
    first = [name for name in before if f".{ADAPTER}" in name]
    add_lora(network, config, seed, name)
    new = [name for name, _ in trainable(network)]
    activate(network, ADAPTER)
    for parameter_name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter_name in {*before, *new})
    return {parameter_name: _other(parameter_name, name) for parameter_name in first}


def _other(name: str, adapter: str) -> str:
    """Return the name of the corresponding parameter in another set."""
    before, _, after = name.rpartition(f".{ADAPTER}")
    return f"{before}.{adapter}{after}"


def add_reference_adapter(network: Any, config: LoraConfig, adapter: str = REFERENCE) -> dict[str, Tensor]:
    """Add a frozen set of adapters by a name, equal to the trained set as it is now and without dropout.

    Returns:
        Its tensors by the names of the trained parameters that they stand beside.
    """
    add_lora(network, replace(config, dropout=0.0), adapter=adapter)
    activate(network, ADAPTER)  # trains this set again, and freezes the other
    every = dict(network.named_parameters())
    held = {}
    for name, parameter in trainable(network):
        held[name] = every[_other(name, adapter)].detach()
        held[name].copy_(parameter.detach())
    return held


def set_magnitudes(network: nn.Module, adapter: str = ADAPTER) -> None:
    """Measure DoRA's magnitudes again, in float32.

    Peft measures them in the base's dtype and compares them with float32 norms in every forward, so that over
    a bfloat16 base the adapter would not start as the identity.
    """
    from peft.tuners.lora import LoraLayer

    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            magnitude: Any = layer.lora_magnitude_vector[adapter]
            magnitude.update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A[adapter].weight,
                lora_B=layer.lora_B[adapter].weight,
                scaling=layer.scaling[adapter],
            )


def check_targets(network: nn.Module, targets: tuple[str, ...], where: str = "model.lora.targets") -> None:
    """Every target must be the end of some module's name: peft itself would overlook a misspelt one.

    Raises:
        UserError: with examples of names that exist.
    """
    names = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if missing or not targets:
        endings = sorted(
            {
                ".".join(n.split(".")[-2:]) if n.rsplit(".", 1)[-1].isdigit() else n.rsplit(".", 1)[-1]
                for n in names
            }
        )
        raise UserError(
            f"{where}: {', '.join(missing) or 'empty'} matches no linear or convolutional module; "
            f"allowed: endings of module names, such as {', '.join(endings)} (a whole name: {names[0]})"
        )


def reference_denoiser(
    model: LoadedModel, policy: NetworkDenoiser, config: ModelConfig, autocast: torch.dtype | None = None
) -> Denoiser:
    """Return the frozen reference, equal to the policy as it is now; call it before training.

    Under LoRA it is the policy's own network with the adapters off. Otherwise it is a copy, run under the
    policy's autocast, whose products hold ``config.dtype`` where the policy autocasts to that; the rest is
    float32, since a reference that computes in another precision than the policy puts a margin between
    equals.

    Args:
        policy: the denoiser that trains, before any wrapping of its network.
        autocast: what the policy's forward is autocast to (``training.mixed_precision``), or None.
    """
    if config.train == "lora":
        return AdaptersOff(policy, policy.network)
    held: Any = copy.deepcopy(model.network).requires_grad_(False).eval()
    with only_errors("diffusers"):  # it advises against casting
        held.float()
    if autocast == model.dtype:
        cast_products(held, model.dtype)
    if config.compile:
        compile_network(held)
    return replace(policy, network=held, autocast=autocast)


def cast_products(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that autocast would cast in each forward, of linear and convolutional layers, and no
    others: modulations and norms of a transformer are computed in the precision of their own weights.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.to(dtype)


def following_reference(
    model: LoadedModel,
    policy: NetworkDenoiser,
    config: ModelConfig,
    autocast: torch.dtype | None = None,
    soft: bool = False,
    adapter: str = REFERENCE,
) -> tuple[Denoiser, dict[str, Tensor]]:
    """Return a reference that will follow the policy, equal to it as it is now; see ``reference_denoiser``.

    Under LoRA it is a second set of adapters on the policy's own network: no second copy of the base.

    Args:
        soft: whether it will move by less than a copy; a copy of the network is then float32, since small
            moves round away in half precision.
        adapter: name of the set of adapters.

    Returns:
        The denoiser, and what must be moved: its tensors by the names of the trained parameters.
    """
    if config.train == "lora":
        return OtherAdapter(policy, model.network, adapter), add_reference_adapter(
            model.network, config.lora, adapter
        )
    reference: Any = reference_denoiser(model, policy, config, autocast)
    if soft:
        with only_errors("diffusers"):  # it advises against casting
            reference.network.float()
    return reference, {name: p.detach() for name, p in reference.network.named_parameters()}


def policy_denoiser(model: LoadedModel, config: ModelConfig) -> NetworkDenoiser:
    """Return the prepared network; inputs have the frozen weights' dtype, or float32 where all is trained."""
    return replace(model.denoiser(), dtype=model.dtype if config.train == "lora" else torch.float32)


def trainable(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require a gradient."""
    return [(name, p) for name, p in network.named_parameters() if p.requires_grad]


def trainable_state(model: LoadedModel) -> dict[str, Tensor]:
    """Detached trained weights by name: what a checkpoint holds."""
    return {name: p.detach() for name, p in trainable(model.network)}


def load_trainable_state(model: LoadedModel, state: Mapping[str, Tensor]) -> None:
    """Put saved weights back, in place.

    Raises:
        UserError: names or shapes differ from what is trained here.
    """
    here = dict(trainable(model.network))
    if here.keys() != state.keys():
        odd = sorted(here.keys() ^ state.keys())
        raise UserError(
            f"incompatible checkpoint: it trains {len(state)} tensors, this run {len(here)}; "
            f"{odd[0]} is in only one of them. Allowed: a checkpoint of a run with the same model.path, "
            "model.train and model.lora"
        )
    for name, parameter in here.items():
        if parameter.shape != state[name].shape:
            raise UserError(
                f"incompatible checkpoint: {name} has shape {tuple(state[name].shape)}, "
                f"this run has {tuple(parameter.shape)}; allowed: a checkpoint of a run with the same "
                "model.lora.rank"
            )
    with torch.no_grad():
        for name, parameter in here.items():
            parameter.copy_(state[name])


def has_lora_loader(family: Family) -> bool:
    """Whether the family's pipeline in diffusers loads LoRAs of its network; peft does on any."""
    import diffusers
    from diffusers.loaders import PeftAdapterMixin

    pipeline = getattr(diffusers, FAMILIES[family.name].pipeline)
    takes = issubclass(getattr(diffusers, family.network_class), PeftAdapterMixin)
    return takes and hasattr(pipeline, "load_lora_weights")


def inject(network: Any, config: Any, adapter: str) -> None:
    """Put adapters of a peft configuration on a network, under a name, and make them the active ones."""
    from diffusers.loaders import PeftAdapterMixin
    from peft import inject_adapter_in_model

    if isinstance(network, PeftAdapterMixin):
        network.add_adapter(config, adapter_name=adapter)
    else:
        inject_adapter_in_model(config, network, adapter)
        activate(network, adapter)


def activate(network: nn.Module, adapter: str) -> None:
    """Send a network through one set of adapters, and train that set alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(adapter)
