"""A LogWriter of the test's own, on a file."""

import json
import sys
from pathlib import Path

from deadlines import PATIENCE, wait_until

from tproxy_relay.logs.writer import LogWriter
from tproxy_relay.settings import Settings


class Writing:
    """A LogWriter on a file, between start and stop."""

    def __init__(self, path: Path | str, log_format: str = "json", log_level: str = "info") -> None:
        self.path = Path(path)
        self.writer = LogWriter(Settings(log_file=str(path), log_format=log_format, log_level=log_level), None)
        self.writer.start()

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.writer.stop(PATIENCE)

    def await_stuck(self) -> None:
        """The writer waits for whoever reads the log; it has taken from the queue what it will."""
        thread = self.writer.debug_state()["thread"]
        wait_until(lambda: sys._current_frames()[thread].f_code.co_name == "write", "the writer writes")

    def text(self) -> str:
        """What is in the file."""
        return self.path.read_text(encoding="utf-8")

    def lines(self) -> list[dict[str, object]]:
        """The JSON lines in the file."""
        return [json.loads(one) for one in self.text().splitlines()]
