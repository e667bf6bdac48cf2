"""A browser that looks at the page of a relay in the lab: headless Chromium, driven by WebDriver."""

import contextlib
import selectors
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from tproxy_relay.lab import Host

PATIENCE = 20.0
BLOCK = 65536
QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
)
"""Nothing that would want another network, or a screen."""


def missing() -> str | None:
    """What is not installed, if something is not."""
    return next((name for name in ("chromium", "chromedriver") if shutil.which(name) is None), None)


class Door:
    """A port of this host that leads to one of a host of the lab, whose loopback interface is another one."""

    def __init__(self, host: Host, port: int) -> None:
        self._host, self._port = host, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stop, self._wake = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._stop, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="door")
        self._thread.start()

    @property
    def port(self) -> int:
        """Of this host."""
        return int(self._listener.getsockname()[1])

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._stop:
                    return
                if key.fileobj is self._listener:
                    self._let_in()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj.fileno() >= 0:  # not just closed
                    self._pass_on(key.fileobj, key.data)

    def _let_in(self) -> None:
        here, _ = self._listener.accept()
        try:
            there = self._host.connect("127.0.0.1", self._port)
        except OSError:
            here.close()
            return
        for one, other in ((here, there), (there, here)):
            one.settimeout(PATIENCE)
            self._selector.register(one, selectors.EVENT_READ, other)

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = one.recv(BLOCK)
            other.sendall(data)
        if not data:
            for sock in (one, other):
                self._selector.unregister(sock)
                sock.close()

    def close(self) -> None:
        """Lead nowhere any more."""
        self._wake.send(b".")
        self._thread.join(PATIENCE)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
        self._wake.close()


class Browser:
    """One window, at the page of the relay whose admin interface has that port of that host."""

    def __init__(self, host: Host, port: int) -> None:
        self._stack = contextlib.ExitStack()
        door = Door(host, port)
        self._stack.callback(door.close)
        folder = tempfile.mkdtemp(prefix="tproxy-relay-browser-")
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for argument in (*QUIET, f"--user-data-dir={folder}", "--window-size=1280,900"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        try:
            self.driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
            self._stack.callback(self.driver.quit)
            self.driver.get(f"http://127.0.0.1:{door.port}/")
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def text(self, selector: str) -> str:
        """What is to be read there."""
        return self.driver.find_element(By.CSS_SELECTOR, selector).text

    def texts(self, selector: str) -> list[str]:
        """The same of all that there are."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)", selector
        )
        return found

    def run(self, script: str, *arguments: object) -> Any:
        """A script in the page."""
        return self.driver.execute_script(script, *arguments)

    def click(self, selector: str) -> None:
        """With the mouse."""
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def type(self, selector: str, text: str) -> None:
        """In place of what is there."""
        field = self.driver.find_element(By.CSS_SELECTOR, selector)
        field.clear()
        field.send_keys(text)

    def become(self, width: int, height: int, *, mobile: bool = False) -> None:
        """Of another size, in pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """What the browser has logged: errors of scripts, what the policy of the page has kept out."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]

    def picture(self, path: Path) -> None:
        """Of all that is to be seen."""
        self.driver.save_screenshot(str(path))

    def wait(self, happened: Callable[[], object], what: str) -> None:
        """Until it is so."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what}; {self.complaints()}"
            time.sleep(0.05)
