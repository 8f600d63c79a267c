"""Say what is going on whenever nothing else has been said for some time: no run looks dead, in a file either.

A script that is busy with one long step, such as a validation, a download or a build, logs at least every
`SILENCE` seconds (at the level of report lines: a terminal has a progress bar instead).
"""

import logging
import threading
import time

logger = logging.getLogger("darts.progress")

SILENCE = 15  # seconds
_state = {"doing": "starting: reads the images, and builds the C++ operators if this is their first use"}


def doing(what):
    """Set what the next line says."""
    _state["doing"] = what


def counted(batches, label):
    """Yield the batches (input, target) of a data.Batches, and keep count of their images, in the shares of all."""
    done = 0
    for input, target in batches:
        doing(f"{label}: {done} of {len(batches.labels)} images")
        yield input, target
        done += len(target) * batches.team.count


class Pulse(logging.Handler):
    """A handler of the root logger that notes when something is logged; its thread breaks silences until `close`."""

    def __init__(self, silence=SILENCE):
        super().__init__()
        self.silence, self.last, self._ended = silence, time.monotonic(), threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def emit(self, record):
        self.last = time.monotonic()

    def close(self):
        self._ended.set()
        super().close()

    def _beat(self):
        while not self._ended.wait(self.last + self.silence - time.monotonic()):
            if time.monotonic() - self.last >= self.silence:
                self.last = time.monotonic()
                logger.debug("at work: %s", _state["doing"])
