"""What happened in the last minutes, second by second, for plots and for rates."""

from collections import deque
from typing import NamedTuple

SECONDS = 600
"""Of samples that are kept, one a second: ten minutes."""
RECENT = 10.0
"""Seconds that a rate is about."""


class Sample(NamedTuple):
    """The counters of the relay at one moment."""

    at: float
    """Seconds since 1970 (time.time())."""
    accepted: int
    live: int
    failed: int
    """Closed with an outcome that is not an ordinary end."""
    bytes_up: int
    bytes_down: int


class History:
    """The samples of the last minutes, and what they say of the rates now."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=SECONDS)
        self.last_accepted: float | None = None
        """When a connection last came (time.time()), to a second; None: never."""

    def add(self, sample: Sample) -> None:
        """Keep this sample, the newest one; the oldest is dropped after SECONDS."""
        if sample.accepted > (self._samples[-1].accepted if self._samples else 0):
            self.last_accepted = sample.at
        self._samples.append(sample)

    def rates(self) -> dict[str, float]:
        """How many connections and bytes there were a second, over the last RECENT seconds; 0 with one sample."""
        if len(self._samples) < 2:
            return {"accepted": 0.0, "failed": 0.0, "bytes_up": 0.0, "bytes_down": 0.0}
        last = self._samples[-1]
        first = next(one for one in self._samples if last.at - one.at <= RECENT)
        if first is last:
            first = self._samples[-2]
        seconds = max(0.001, last.at - first.at)
        return {
            name: round((getattr(last, name) - getattr(first, name)) / seconds, 3)
            for name in ("accepted", "failed", "bytes_up", "bytes_down")
        }

    def columns(self) -> dict[str, list[float]]:
        """All samples, oldest first: a list for each field of Sample."""
        return {name: [getattr(one, name) for one in self._samples] for name in Sample._fields}
