"""The pool's threads, counted, so that a connection gets all the threads it needs or is not accepted.

The threads come from a ThreadPoolExecutor, which cannot be asked whether it has one to spare:

- a submit() that fails to start a thread ("can't start new thread") raises, but leaves its item queued, and a
  later thread runs it;
- its count of idle threads goes wrong after that, and on Python 3.12 and later also when a submit() meets a thread
  that is just becoming idle: the next item can then wait behind threads that are busy for hours;
- it never lets a thread go;
- its threads are daemons only if a daemon calls submit(), and before Python 3.13 each start of one that is none looks
  at all those that are there: to open 9,000 connections takes 7.6 s that way, and 3.0 s with daemons.

So what is submitted here is one job per thread, `_serve`, which takes tasks from our own queue for as long as
the thread lives, and the free threads are counted here. `reserve` comes before accept(), and the second pump of a
connection never waits for a thread. A daemon, the starter, calls submit(), for some threads at a time.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

STACK_BYTES = 256 * 1024
"""Of address space per thread; only touched pages cost memory. Half of it is known to crash deep recursion."""

SPARE = 32
"""Free threads that are kept, so that the next connections do not wait for threads to start; and so many are started at
a time when they do not suffice."""

log = logging.getLogger(__name__)

Task = Callable[[], None]


class _Start:
    """Whether a job that the executor may still hold is wanted, and which executor that is.

    Not the executor itself: it keeps the Thread objects of all that it ever started, so one long connection
    would hold on to those of thousands that have ended.
    """

    __slots__ = ("generation", "cancelled")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.cancelled = False


class ThreadPool:
    """A ThreadPoolExecutor that grows by reservation and shrinks when it rests."""

    def __init__(self, limit: int, spare: int = SPARE) -> None:
        self._limit = limit
        self._spare = spare
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._starter: threading.Thread | None = None
        self._lock = threading.Lock()
        self._free = 0
        self._lowest_free = 0
        self._closed = False
        self._generation = 0
        threading.stack_size(STACK_BYTES)
        self._executor = self._new_executor()
        if spare:
            self._start_threads(spare)

    def _new_executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._limit + self._spare, thread_name_prefix="relay")

    def reserve(self, count: int) -> bool:
        """Set `count` threads aside, starting what is missing. False if the system gives no more threads."""
        with self._lock:
            if self._free < count:
                self._start_threads(max(self._spare, count - self._free))
            if self._free < count:
                return False
            self._free -= count
            self._lowest_free = min(self._lowest_free, self._free)
            return True

    def release(self, count: int) -> None:
        """Give threads back that were set aside and have done their task, or never got one."""
        with self._lock:
            self._free += count
            if self._closed:
                self._end_threads(count)

    def run(self, task: Task) -> None:
        """Hand a task to a thread that was set aside."""
        self._tasks.put(task)

    def _start_threads(self, count: int) -> None:
        """So many more, or fewer if the system gives no more."""
        if self._starter is None:
            starter = threading.Thread(target=self._start_what_is_ordered, name="starter", daemon=True)
            try:
                starter.start()
            except RuntimeError:
                return
            self._starter = starter
        self._orders.put(count)
        self._done.get()

    def _start_what_is_ordered(self) -> None:
        while count := self._orders.get():
            for _ in range(count):
                if not self._start_thread():
                    break
            self._done.put(None)

    def _start_thread(self) -> bool:
        start = _Start(self._generation)
        try:
            self._executor.submit(self._serve, start)
        except (RuntimeError, MemoryError):
            start.cancelled = True
            self._retire_executor()
            return False
        self._free += 1
        return True

    def _retire_executor(self) -> None:
        """Its threads go on; each of them ends when `_serve` does."""
        self._executor.shutdown(wait=False)
        self._executor = self._new_executor()
        self._generation += 1

    def _serve(self, start: _Start) -> None:
        if start.cancelled:
            return
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                log.critical("a relay thread met a bug", exc_info=True)
            del task  # or the last connection would live on in the waiting thread's frame
        with self._lock:
            if start.generation == self._generation:
                self._retire_executor()  # or it would count this thread as idle, and start none in its place

    def trim(self) -> bool:
        """Let the threads go that have been free since the last call, but for the spare ones. Call it about
        once a second. False if there is nothing left to trim."""
        with self._lock:
            surplus = min(self._lowest_free, self._free) - self._spare
            self._lowest_free = self._free
            if surplus > 0:
                self._end_threads(surplus)
            return self._free > self._spare

    def close(self) -> None:
        """Let all threads go: the free ones now, the others when they are released. Does not wait."""
        with self._lock:
            self._closed = True
            self._end_threads(self._free)
            self._orders.put(0)

    def _end_threads(self, count: int) -> None:
        self._free -= count
        self._retire_executor()
        for _ in range(count):
            self._tasks.put(None)
