"""A child process that serves rewards: ``diffalign serve-rewards`` on a free port."""

import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from diffalign.errors import UserError

_PATIENCE = 5.0  # seconds to end by itself


class RewardProcess:
    """Serves rewards on this machine until ``end``, or until this process ends in any way."""

    def __init__(self, specs: Sequence[str], device: str = "cpu", dtype: str = "float32"):
        """Start the process and wait until it serves; UserError with its last output if it ends before."""
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "diffalign", "serve-rewards", "--port", "0"),
                *("--rewards", ",".join(specs), "--device", device, "--dtype", dtype),
                *("--parent", str(os.getpid())),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=_environment(),
            start_new_session=True,  # Ctrl-C goes to this process only, which may save a checkpoint first
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        assert self._process.stdout is not None
        line = ""
        while not line.startswith("http://"):  # libraries may print lines while they are loaded
            raw = self._process.stdout.readline()
            if not raw:
                self._process.wait()
                raise UserError(
                    f"rollout.scoring is process, but the process of the rewards {self.post_mortem()}"
                )
            line = raw.decode(errors="replace").strip()
        self.address = line

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def post_mortem(self) -> str | None:
        """Return how the process ended, with its last line of output; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return f"ended with status {status}: {lines[-1] if lines else 'no output'}"

    def end(self) -> None:
        """End the process if it runs."""
        self._finalizer()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _environment() -> dict[str, str]:
    """Return this process's environment, with the path of this diffalign, for any working folder."""
    here = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
