"""Progress display in a terminal or a log."""

import math
import sys
import time
from typing import Any


class Display:
    """A progress bar in a terminal; elsewhere a line from time to time.

    **Arguments:** `stream`: a text file, by default stderr. `seconds_between_lines`: the minimum.
    `at_once`: whether the first call prints a line, or the first one after that many seconds.
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
        """Shows the progress.

        **Arguments:** `total`: `None` if unknown. `unit`: of `done` and `total`. `state`: the text
        behind the bar. `line`: the line to print if there is no bar. `last`: whether to print the
        line without waiting.
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
        """Closes the bar and leaves it on the screen."""
        if self._bar is not None:
            self._bar.close()
