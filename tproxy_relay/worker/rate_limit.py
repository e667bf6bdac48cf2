"""How many connections a client address has opened within the last second, in the whole relay.

A window that slides, like HAProxy's conn_rate: what came in the second before this one counts for as much of that
second as the window still covers. Whoever is refused is not counted, so a client that does not stop is still served
as often as it may be.
"""

import time
from collections import Counter, defaultdict

from tproxy_relay.ipc.slot import Slot


class RateLimit:
    """The arrivals at one worker; those at the other workers are in the tables of the scoreboard. Main thread only."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._seconds: defaultdict[int, Counter[str]] = defaultdict(Counter)

    def debug_state(self) -> dict[str, int]:
        """For tests: of how many seconds it remembers something."""
        return {"seconds": len(self._seconds)}

    def admit(self, host: str, most: int) -> bool:
        """Count one more, unless `most` have come within a second already. At the scoreboard's turn, or two workers may
        each admit the last one."""
        now = time.monotonic()  # of the whole machine: the workers have the same seconds
        second = int(now)
        self._forget(second)
        before = self._count(host, second - 1) * (1 - now % 1)
        if before + self._count(host, second) >= most:
            return False
        self._seconds[second][host] += 1
        self._slot.arrivals.add(self._key(host, second))
        return True

    def _count(self, host: str, second: int) -> int:
        return self._seconds[second][host] + self._slot.arrivals.elsewhere(self._key(host, second))

    def _key(self, host: str, second: int) -> bytes:
        return self._slot.scoreboard.digest(f"{host} {second}")

    def _forget(self, second: int) -> None:
        for old in [one for one in self._seconds if one < second - 1]:
            for host, count in self._seconds.pop(old).items():
                for _ in range(count):
                    self._slot.arrivals.remove(self._key(host, old))
