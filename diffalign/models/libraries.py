"""Import of the libraries that load a pipeline, once a process."""

import gc
import importlib

LIBRARIES = ("diffusers.pipelines.pipeline_utils", "transformers.modeling_utils", "peft")


def import_libraries() -> None:
    """Import diffusers, transformers and peft with the collector of cyclic garbage off.

    They make some hundred thousand objects that stay. The collector walks these again and again while they
    grow: loading the tiny SDXL took 4.9 s of a processor with it, and takes 4.3 s without.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        for name in LIBRARIES:
            importlib.import_module(name)
    finally:
        if collects:
            gc.enable()
