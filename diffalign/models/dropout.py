"""The dropout of a network: off in policy and reference, so that both are the same function at the start."""

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def switch_off_dropout(network: nn.Module) -> int:
    """Set the probability of every dropout layer of ``network`` to 0; return the number of changed layers.

    Preference losses compare the predictions of policy and reference; with dropout they differ even with
    equal weights, by far more than training changes them. LoRA's own dropout is set when adapters are added,
    after this, and stays.
    """
    layers = [module for module in network.modules() if isinstance(module, _DropoutNd) and module.p]
    for layer in layers:
        layer.p = 0.0
    return len(layers)
