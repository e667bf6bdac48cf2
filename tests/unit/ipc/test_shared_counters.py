"""Counts that several processes see: like a Counter, as long as every key finds an entry."""

import mmap
import random
from collections import Counter
from pathlib import Path

import children
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tproxy_relay.ipc.shared_counters import ENTRY_BYTES, KEY_BYTES, WINDOW, Table

keys = st.lists(st.sampled_from(b"\0\1"), min_size=KEY_BYTES, max_size=KEY_BYTES).map(bytes)
"""So alike that they are found in the middle of each other and across the seams between entries."""


def table(windows: int) -> Table:
    return Table(memoryview(bytearray(windows * WINDOW * ENTRY_BYTES)))


def key(number: int, window: int = 0, windows: int = 1) -> bytes:
    """The key of that number among those that belong into this window."""
    first = (number * windows + window).to_bytes(8, "little")
    return first + bytes(KEY_BYTES - 8)


@given(
    st.lists(keys, min_size=1, max_size=WINDOW, unique=True),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, WINDOW), st.booleans()), max_size=200),
)
@hypothesis_settings(max_examples=300, deadline=None)
def test_like_a_counter(some: list[bytes], windows: int, operations: list[tuple[int, bool]]) -> None:
    counts, expected = table(windows), Counter[bytes]()
    for number, add in operations:
        one = some[number % len(some)]
        if add:
            counts.add(one)
            expected[one] += 1
        elif expected[one]:
            counts.remove(one)
            expected[one] -= 1
        else:
            counts.remove(one)  # is not an error
        assert {each: counts.count(each) for each in some} == {each: expected[each] for each in some}


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=400))
@hypothesis_settings(max_examples=100, deadline=None)
def test_entries_are_used_again(operations: list[tuple[int, bool]]) -> None:
    """Of many keys over time, as long as not more of them are there at once than a window has entries."""
    counts, expected = table(1), Counter[bytes]()
    for number, add in operations:
        one = key(number)
        if add and (expected[one] or len(+expected) < WINDOW):
            counts.add(one)
            expected[one] += 1
        elif not add:
            counts.remove(one)
            expected[one] = max(0, expected[one] - 1)
    assert all(counts.count(key(number)) == expected[key(number)] for number in range(61))


def test_a_key_that_finds_no_room_is_not_shared_and_disturbs_nobody() -> None:
    counts = table(2)
    taken = [key(number, window=0, windows=2) for number in range(WINDOW)]
    for one in taken:
        counts.add(one)
    late, elsewhere = key(WINDOW, window=0, windows=2), key(0, window=1, windows=2)
    counts.add(late)
    counts.add(elsewhere)
    assert (counts.count(late), counts.count(elsewhere)) == (0, 1)
    assert all(counts.count(one) == 1 for one in taken)
    counts.remove(late)
    assert all(counts.count(one) == 1 for one in taken)
    counts.remove(taken[3])
    counts.add(late)
    assert (counts.count(late), counts.count(taken[3])) == (1, 0)


def test_a_third_full_nearly_every_key_finds_room() -> None:
    chance, connections = random.Random(1), 5_000
    counts = table(3 * connections // WINDOW)
    some = [chance.randbytes(KEY_BYTES) for _ in range(connections)]
    for one in some:
        counts.add(one)
    assert sum(counts.count(one) != 1 for one in some) <= 1


def test_memory_that_is_given_back_can_be_unmapped() -> None:
    memory = mmap.mmap(-1, WINDOW * ENTRY_BYTES)
    whole = memoryview(memory)
    counts = Table(whole)
    counts.add(key(1))
    with pytest.raises(BufferError):
        memory.close()
    counts.release()
    whole.release()
    memory.close()


# --- between two processes


WRITE = """
import mmap, sys
from tproxy_relay.ipc.shared_counters import Table
with open(sys.argv[1], "r+b") as file:
    counts = Table(memoryview(mmap.mmap(file.fileno(), 0)))
key = lambda number: number.to_bytes(16, "big")
for number in range(8):
    counts.add(key(number))
counts.add(key(7))
print("there", flush=True)
sys.stdin.readline()
for turn in range(int(sys.argv[2])):
    for number in range(8, 16):
        counts.add(key(number + 8 * (turn % 3)))
    for number in range(8, 16):
        counts.remove(key(number + 8 * (turn % 3)))
print("done", flush=True)
"""


def test_another_process_reads_what_one_writes(tmp_path: Path) -> None:
    """Without a lock: what stays is read right at every moment, what changes is off by no more than a moment."""
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(WINDOW * ENTRY_BYTES))
    stays = {number.to_bytes(16, "big"): 2 if number == 7 else 1 for number in range(8)}
    comes_and_goes = [number.to_bytes(16, "big") for number in range(8, 32)]
    with memory.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        with memoryview(mapped) as whole, children.running_python(WRITE, str(memory), "4000") as writer:
            counts = Table(whole)
            assert writer.stdin is not None and writer.stdout is not None
            assert writer.stdout.readline() == "there\n"
            writer.stdin.write("\n")
            writer.stdin.flush()
            seen = set[int]()
            while writer.poll() is None:
                assert {one: counts.count(one) for one in stays} == stays
                seen.update(counts.count(one) for one in comes_and_goes)
            assert writer.stdout.read() == "done\n"
            assert seen <= {0, 1}
            assert not any(counts.count(one) for one in comes_and_goes)
            counts.release()
