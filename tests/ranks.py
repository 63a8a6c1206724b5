"""Processes of one run, as torchrun starts them, that share their imports: they are forked after these.

``python -m tests.ranks [--pipelines] COUNT MODULE ARGUMENT...`` runs a module in so many processes on one
machine. torchrun starts an interpreter for each, which takes seconds to import torch and diffusers.
With ``--pipelines`` diffusers, transformers and peft are imported before the fork, too.
"""

import gc
import importlib
import os
import runpy
import signal
import sys

import torch

from diffalign.models.libraries import import_libraries


def main() -> None:
    """Start the processes and wait; the exit status is 1 if one of them fails, and the others are ended."""
    arguments = sys.argv[1:]
    if arguments[0] == "--pipelines":
        arguments = arguments[1:]
        import_libraries()
    count, module, *arguments = arguments
    importlib.import_module(module)
    gc.freeze()  # no child copies the pages of what stays
    children: dict[int, int] = {}
    for rank in range(int(count)):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            _become(rank, int(count), int(os.read(reading, 16)))
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            return
        children[child] = writing
    _wait(children, int(count))


def _become(rank: int, count: int, port: int) -> None:
    """Set what torchrun sets; the launcher holds the store."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _wait(children: dict[int, int], count: int) -> None:
    """Open the store, whose threads must not be forked, tell its port, and wait for every child."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        store = torch.distributed.TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False)
        for writing in children.values():
            os.write(writing, str(store.port).encode())
        while children:
            child, status = os.wait()
            del children[child]
            if status:
                sys.exit(1)
    finally:
        for child in children:
            os.kill(child, signal.SIGTERM)


if __name__ == "__main__":
    main()
