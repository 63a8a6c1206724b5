"""``diffalign cache``: encode a preference set before training, in one or more processes."""

import sys
from collections.abc import Sequence
from pathlib import Path

from diffalign.cli.flags import read_flags, resolve

USAGE = """\
usage: diffalign cache CONFIG [--a.b VALUE ...]

Encode the preference set of a config once: latents and text embeddings, kept under data.cache_dir (default:
<output>/cache) and found again by `diffalign train` with the same model, data and settings. What is encoded
already is not encoded again, and rows without a label, ties and unreadable images are counted. Takes all
flags of `train`.

examples:
  diffalign cache sdxl_dpo_lora --data.path pairs.parquet --data.cache_dir cache/sdxl
  diffalign cache tiny_sdxl_dpo --data.cache_dir cache/tiny
  torchrun --nproc-per-node 4 -m diffalign cache sdxl_dpo_lora --data.path pairs.parquet
"""


def run(argv: Sequence[str]) -> int:
    """Encode the set and print its contents."""
    if {"-h", "--help"} & set(argv):
        print(USAGE, end="")
        return 0
    run, notes = resolve(read_flags(argv), needs=("model.path", "data.path"))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if run.rollout.prompts:
        from diffalign.errors import UserError

        raise UserError(
            f"rollout.prompts={run.rollout.prompts!r}: this run samples what it learns from, and there is "
            "nothing to encode before it; allowed: a run with data.path"
        )
    from diffalign.data import check_files, read_preferences
    from diffalign.models.loading import load
    from diffalign.runs.setup import encode
    from diffalign.training.acceleration import accelerator_for

    accelerator = accelerator_for(run.training)
    preferences = read_preferences(run.data, run.training.seed)
    check_files(preferences, run.data, lambda line: print(line, file=sys.stderr))
    encoded = encode(run, load(run.model, accelerator.device), preferences, accelerator)
    if accelerator.is_main_process:
        for place in encoded.counts.skipped:
            print(f"skipped: {place}", file=sys.stderr)
        print(encoded.counts.text)
        print(f"the cache is {run.data.cache_dir or Path(run.output) / 'cache'}", file=sys.stderr)
    return 0
