"""``diffalign estimate``: memory, FLOPs and time of a run, before it starts."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffalign.cli.common import print_json
from diffalign.cli.flags import read_flags, resolve
from diffalign.errors import UserError

if TYPE_CHECKING:
    from diffalign.estimate.workload import Workload

USAGE = """\
usage: diffalign estimate CONFIG [--a.b VALUE ...] [--tflops T] [--utilisation U] [--fits G] [--json]

Parameters, memory by part and FLOPs per pair of a config, from shapes alone: no weights, no data, no
network access. Takes all flags of `train`.

  --tflops T        peak speed of the device in TFLOP/s, for the time: H100 989 (bf16), A100 312, RTX 4090 165
  --utilisation U   share of the peak that training reaches; default 0.4
  --fits G          what to add to the config until it fits a card of G GiB, a row a try; 10 % and 0.6 GiB are
                    kept for the allocator and the driver
  --json            machine-readable

examples:
  diffalign estimate sdxl_dpo_lora_24gb
  diffalign estimate qwen_image_dpo_lora --fits 24
  diffalign estimate sdxl_dpo --tflops 989 --utilisation 0.35
  diffalign estimate sd15_dpo_lora --training.batch_size 4 --model.gradient_checkpointing true --json
"""


def run(argv: Sequence[str]) -> int:
    """Print the estimate."""
    if {"-h", "--help"} & set(argv):
        print(USAGE, end="")
        return 0
    rest = list(argv)
    tflops, utilisation, card = (_option(rest, name) for name in ("tflops", "utilisation", "fits"))
    flags = read_flags(rest, own_switches=("json",))
    run, _ = resolve(flags, needs=("model.path",))
    from diffalign.estimate.estimate import estimate
    from diffalign.runs.micro_batch import workload_of

    work = workload_of(run)
    if card is not None:
        return _fit(work, card, bool(flags.switches))
    result = estimate(work, tflops) if utilisation is None else estimate(work, tflops, utilisation)
    if flags.switches:
        print_json(result.as_dict())
        return 0
    rows = result.rows()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return 0


def _fit(work: "Workload", card: float, as_json: bool) -> int:
    """Print what the run takes with one option more at a time; 1 where nothing makes it fit."""
    from diffalign.estimate.estimate import size
    from diffalign.estimate.fitting import fitting

    tries = list(fitting(work, card))
    if as_json:
        keys = ("options", "card", "needed", "fits")
        print_json([{key: getattr(t, key) for key in keys} | t.estimate.as_dict() for t in tries])
        return 0 if tries[-1].fits else 1
    names = ["as it is", *(t.options[-1] for t in tries[1:])]
    width = max(map(len, names))
    print(f"{'':<{width}}  {'training':>10}  {'caching':>10}  needs")
    for name, t in zip(names, tries, strict=True):
        train, cache = size(t.estimate.total_memory), size(t.estimate.encoder_memory)
        print(f"{name:<{width}}  {train:>10}  {cache:>10}  {t.needed:.1f} GiB{', fits' if t.fits else ''}")
    last = tries[-1]
    if last.fits:
        print(f"fits {card:g} GiB{' with ' + ' '.join(last.options) if last.options else ' as it is'}")
        if paged := last.estimate.paged:
            print(f"{size(paged)} of optimizer state in main memory, or on the GPU while it has room")
        return 0
    print(f"does not fit {card:g} GiB; what is left: a smaller data.resolution, or fewer data.frames")
    return 1


def _option(words: list[str], name: str) -> float | None:
    """Take ``--name VALUE`` or ``--name=VALUE`` out of the words."""
    for i, word in enumerate(words):
        flag, equals, text = word.partition("=")
        if flag != f"--{name}":
            continue
        if not equals and i + 1 == len(words):
            raise UserError(f"--{name} needs a value")
        text = text if equals else words.pop(i + 1)
        del words[i]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0) or (name == "utilisation" and value > 1):
            allowed = "more than 0, up to 1" if name == "utilisation" else "a number above 0"
            raise UserError(f"--{name} {text!r}; allowed: {allowed}")
        return value
    return None
