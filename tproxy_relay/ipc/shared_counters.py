"""How often each key occurs in the whole relay: every worker writes a table of its own, and reads those of the others.

A table has one writer at a time, and readers take no lock: they may be late by a moment. Keys are digests, so a
client's address takes as much room as a flow. A key lives in one of a few entries next to each other, the only ones
that anybody looks at; where all of them are taken the key is not shared, and only its own worker knows of it.
"""

WINDOW = 16
"""Entries that a key may be in. With tables a third full, one key in 100,000 finds no room."""
KEY_BYTES = 16
ENTRY_BYTES = KEY_BYTES + 4
"""The digest, and a 32-bit count."""


class Table:
    """The counts of one worker, in memory that it was given."""

    def __init__(self, memory: memoryview) -> None:
        entries = len(memory) // ENTRY_BYTES
        self._keys = memory[: entries * KEY_BYTES]
        self._counts = memory[entries * KEY_BYTES : entries * ENTRY_BYTES].cast("I")
        self._windows = entries // WINDOW

    def add(self, key: bytes) -> None:
        """Count this key once more; where there is no room for it, nothing happens."""
        first = self._first(key)
        entry = self._find(key, first)
        if entry is None:
            entry = self._unused(first)
            if entry is None:
                return
            self._keys[entry * KEY_BYTES : (entry + 1) * KEY_BYTES] = key
        self._counts[entry] += 1

    def remove(self, key: bytes) -> None:
        """Count it once less; it is not an error if it is not there."""
        entry = self._find(key, self._first(key))
        if entry is not None and self._counts[entry]:
            self._counts[entry] -= 1

    def count(self, key: bytes) -> int:
        """How often it was added and not removed."""
        entry = self._find(key, self._first(key))
        return 0 if entry is None else self._counts[entry]

    def release(self) -> None:
        """Let the memory go: nothing else may be called after that."""
        self._counts.release()
        self._keys.release()

    def _first(self, key: bytes) -> int:
        return int.from_bytes(key[:8], "little") % self._windows * WINDOW

    def _find(self, key: bytes, first: int) -> int | None:
        window = self._keys[first * KEY_BYTES : (first + WINDOW) * KEY_BYTES].tobytes()
        at = window.find(key)
        while at % KEY_BYTES and at >= 0:
            at = window.find(key, at + 1)
        return None if at < 0 else first + at // KEY_BYTES

    def _unused(self, first: int) -> int | None:
        counts = self._counts[first : first + WINDOW].tolist()
        return first + counts.index(0) if 0 in counts else None
