"""How far something is, for whoever waits for it."""

import math
import sys
import time
from typing import Any


class Display:
    """A bar on a terminal; elsewhere a line now and then.

    **Arguments:** `stream`: a text file, by default stderr. `seconds_between_lines`: at least.
    `at_once`: whether the first line comes with the first call, or not before so many seconds.
    """

    def __init__(
        self, stream: Any = None, seconds_between_lines: float = 10.0, *, at_once: bool = True
    ):
        self._stream = stream or sys.stderr
        self._seconds = seconds_between_lines
        self._printed_at = -math.inf if at_once else time.perf_counter()
        self._bar: Any = None

    def __call__(
        self, done: int, total: int | None, unit: str, state: str, line: str, *, last: bool = False
    ) -> None:
        """Shows how far it is.

        **Arguments:** `total`: `None` where it is not known. `unit`: what is counted. `state`:
        what stands behind the bar. `line`: what is printed where there is none. `last`: whether
        it is printed whenever the one before was.
        """
        if self._stream.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(
                    total=total, initial=done, unit=unit, unit_scale=True, file=self._stream
                )
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(done - self._bar.n)
        elif last or time.perf_counter() - self._printed_at >= self._seconds:
            self._printed_at = time.perf_counter()
            print(line.rstrip(), file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
