"""Handling of Ctrl-C and SIGTERM: the run ends after the current step with a checkpoint."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# A launcher forwards the terminal's Ctrl-C to its processes; within this time it is the same request.
SAME_REQUEST_SECONDS = 0.5


class Interruption:
    """Context in which the first SIGINT or SIGTERM sets ``requested``.

    A later SIGINT raises KeyboardInterrupt.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, announce: bool = True):
        self.requested = False
        self._announce = announce
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
            if self._announce:  # os.write, because a handler must not re-enter Python's buffered streams
                os.write(
                    2, b"\ninterrupted: finishing this step, then saving a checkpoint (Ctrl-C again aborts)\n"
                )
        elif number == signal.SIGINT and now - self._since > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
