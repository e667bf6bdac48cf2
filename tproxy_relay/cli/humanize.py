"""Quantities, times and refusals in the words of `status`, `sessions` and `top`."""

import time
from collections.abc import Mapping
from typing import Any


def refusal(record: Mapping[str, Any]) -> str:
    """A record of a connection that was refused, in a line: when, who, where to, and why."""
    why = f": {record['error']}" if record.get("error") else ""
    return f"{clock(record['time'])} {record['client']} to {record.get('orig_dst', '?')}: {record['outcome']}{why}"


def clock(when: float) -> str:
    """Month, day and time of day, in the local time zone; `when` is in seconds since the epoch."""
    return time.strftime("%m-%d %H:%M:%S", time.localtime(when))


def lasted(seconds: float) -> str:
    """A duration, in two units at most: 3 ms, 1.5 s, 2 min 3 s, 5 h 2 min, 3 d 4 h."""
    if seconds < 1:
        return f"{seconds * 1000:g} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = int(seconds)
    for size, name, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {name}" + (f" {rest} {small}" if rest else "")
    raise AssertionError(seconds)


def amount(number: float) -> str:
    """A number of bytes: 12 B, 3.4 KiB, 1.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
