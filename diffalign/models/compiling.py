"""Compilation by torch of a network whose adapters are switched on and off."""

from typing import Any

import torch

from diffalign.errors import UserError

GRAPHS = 64
"""Graphs of one block's code that torch.compile may keep."""


def compile_network(network: Any, backend: str = "inductor") -> None:
    """Compile in place: the repeated blocks where the network names them, which is quicker, or else all.

    Weights and their names stay as they are. Each block has one graph with its adapters and one with them
    passed by, each for training, for evaluation and for a few sizes. Torch stops compiling a function after
    8 graphs, in silence, so its limit is raised.

    Raises:
        UserError: nothing was compiled.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    if network._repeated_blocks:
        network.compile_repeated_blocks(fullgraph=False, backend=backend)
    else:
        network.compile(fullgraph=False, backend=backend)
    if not any(module._compiled_call_impl is not None for module in network.modules()):
        raise UserError("model.compile=true had no effect on this network; allowed here: false")
