"""The command line: ``diffalign COMMAND ...``, one module per command. Importing it imports no torch.

A command module has ``parser()`` (an ``argparse.ArgumentParser``) or, where flags are not argparse's, its own
parsing of arguments, and ``run(argv) -> int``. Bad input raises ``UserError``: its message goes to stderr and
the exit status is 2.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from diffalign.errors import UserError, unknown
from diffalign.utils.memory import ANYWHERE, explained, ran_out
from diffalign.utils.notices import silence_packages

COMMANDS = {
    "demo": "align the embedded tiny SDXL end to end and write a report: start here",
    "train": "align a model with preferences",
    "train-reward": "train SPO's step-aware preference model, a reward for noisy times",
    "data": "show the layout and contents of a preference set",
    "cache": "encode a preference set once, before training",
    "generate": "draw images for a prompt file",
    "label": "compare images or videos in a browser: pairs, rounds of a run, blind evaluations",
    "video-pairs": "make pairs of real videos: two variants of each, to be labelled (DenseDPO)",
    "label-segments": "label pairs of videos second by second: from a file, by a reward or a model",
    "score": "score images with rewards",
    "pairs": "make preference pairs or ranked lists from scores",
    "agreement": "accuracy of rewards on labelled preferences, and their agreement",
    "serve-rewards": "serve rewards to other processes and machines",
    "displacement": "find pairs that are likely to lower their winner's likelihood, and filter them",
    "time-labels": "label pairs in intervals of time by what a run prefers (Semi-DPO)",
    "evaluate": "compare base and aligned models: rewards, win rates with intervals, a report",
    "edit": "change what a model assumes of a word, in closed form and without training (TIME)",
    "export": "write an aligned model for diffusers, ComfyUI, A1111, kohya: LoRA, merged, one file",
    "push": "upload a run's result to the Hugging Face hub, with its model card",
    "estimate": "estimate memory, FLOPs and time of a run",
    "methods": "list the methods",
    "models": "list the model families",
    "rewards": "list the rewards",
    "new": "add a method, a reward or a model family: a template with a test that fails until filled in",
    "env": "versions and hardware, for bug reports",
}

USAGE = """\
usage: diffalign COMMAND [...]

Preference alignment of diffusion models: from preferences to a pipeline that plain diffusers loads.

commands:
{commands}

examples:
  diffalign demo
  diffalign train sdxl_dpo_lora --data.path pairs.parquet --output runs/mine
  diffalign evaluate --run runs/mine --prompts prompts.txt --rewards pickscore

`diffalign COMMAND --help` says more; `diffalign --version` prints the version.
"""

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 2 for bad input, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    silence_packages()
    try:
        status = _dispatch(argv)
        sys.stdout.flush()  # raises here if the pipe is closed
        return status
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `diffalign methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        advice = _advice(error)
        if advice is None:
            print("This is a bug. Please report it with the output of `diffalign env`.", file=sys.stderr)
            raise
        return _refuse(advice)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(
            USAGE.format(commands="\n".join(f"  {n:<{width}}  {what}" for n, what in COMMANDS.items())),
            end="",
        )
        return 0 if argv else 2
    if argv[0] == "--version":
        from diffalign import __version__

        print(f"diffalign {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise unknown("command", argv[0], COMMANDS)
    module = argv[0].replace("-", "_")
    try:
        status: int = importlib.import_module(f"diffalign.cli.{module}").run(argv[1:])
        return status
    except SystemExit as leaving:  # argparse, after --help or a message of its own
        return leaving.code if isinstance(leaving.code, int) else 2


def _refuse(message: str) -> int:
    print(f"error: {message.encode(errors='backslashreplace').decode()}", file=sys.stderr)
    return 2


def _advice(error: Exception) -> str | None:
    """Return advice on an error that is no bug; None for a bug."""
    if ran_out(error):
        return explained(error, "working", ANYWHERE)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # The second: the Rust of safetensors raises an error class of its own.
    if full or "No space left on device" in str(error):
        place = getattr(error, "filename", None)
        where = f" for {place}" if place else ""
        return f"no space left on the disk{where}; free some, or choose another --output"
    if isinstance(error, OSError) and error.errno in _ABOUT_A_FILE:
        return f"{_short(error.filename)}: {error.strerror}"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a name holds a null byte; allowed: the name of a file or folder"
    if isinstance(error, RuntimeError) and "home directory" in str(error).lower():
        return "a path starts with ~NAME, and no home folder of that user is known"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return (
            f"{ascii(error.object)[:80]} holds a byte that is no UTF-8, or half of a surrogate pair; "
            "allowed: text in UTF-8"
        )
    return None


def _short(name: object) -> str:
    text = str(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


_ABOUT_A_FILE = (
    errno.ENOENT,
    errno.EACCES,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EPERM,
)
"""Numbers of errors that tell what is wrong with a file or folder that the user has named."""
