"""What operators write, fuzzed: configuration files, destinations and their rules, lists of ports.

    pip install -e '.[fuzz]'; python tests/fuzz/target.py [-runs=1000000] [other options of libFuzzer]

Guided by coverage (atheris), from tests/fuzz/corpus/ on. The first byte of an input says which parser it is for. All
may be refused, by the one error that is documented, and what is accepted must mean the same when it is written down
again; any other exception is a fault. libFuzzer keeps the input then; once mended, it belongs in the corpus, which
tests/unit/project/test_fuzz_corpus.py plays without atheris.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import atheris
except ImportError:  # the corpus can be played without it
    atheris = None

with atheris.instrument_imports(include=["tproxy_relay"]) if atheris else contextlib.nullcontext():
    from tproxy_relay.config import conf_file, loader, option_addresses, option_types
    from tproxy_relay.errors import ConfigError
    from tproxy_relay.relay.acl import AccessList

CORPUS = Path(__file__).parent / "corpus"
RUNS = "-runs=1000000"
MOST = "-max_len=400"
"""Bytes of an input."""


def feed(data: bytes) -> bool:
    """Give it to its parser. True if it was accepted."""
    parser = PARSERS.get(data[:1])
    return parser is not None and parser(data[1:])


def _configuration(data: bytes) -> bool:
    """A file. Most inputs are none, and the slow part is left out for them."""
    try:
        with _file_of(data) as path:
            conf_file.parse(conf_file.read(path), path)
            first = loader.load(["--config", path], {})
    except ConfigError as refused:
        assert str(refused).isprintable(), "a message is one line"
        return False
    written = loader.print_config(first)
    with _file_of(written.encode()) as path:
        assert loader.load(["--config", path], {}).settings == first.settings, written
    return True


@contextlib.contextmanager
def _file_of(data: bytes) -> Iterator[str]:
    """The path of a file that is nowhere but in memory."""
    with open(os.memfd_create("fuzz.conf"), "wb", buffering=0) as file:
        file.write(data)
        yield f"/proc/self/fd/{file.fileno()}"


def _destination(data: bytes) -> bool:
    """Lines: an address, a port, and lists of what is allowed and of what is denied."""
    host, port, allow, deny = (data.decode(errors="replace").split("\n", 3) + [""] * 3)[:4]
    lists = []
    for text in (allow, deny):
        value = _parsed(option_addresses.NETWORKS, text)
        lists.append(value if isinstance(value, tuple) else ())
    number = _parsed(option_types.PORT, port)
    rules = AccessList(*lists)
    try:
        verdict = rules.judge(host, number if isinstance(number, int) else 80)
    except ValueError:
        return False
    if ":" not in host and verdict.allowed is False:
        assert rules.judge(f"::ffff:{host}", number if isinstance(number, int) else 80).allowed is False
    return True


def _ports(data: bytes) -> bool:
    """Any list of ports."""
    text = data.decode(errors="replace")
    found = [_parsed(kind, text) for kind in (option_types.PORT, option_types.PORTS, option_types.PORT_RANGES)]
    return any(value is not None for value in found)


def _parsed(kind: option_types.OptionType, text: str) -> object:
    """The value, or None."""
    try:
        value = kind.parse(text)
    except option_types.BadValue as refused:
        assert str(refused).isprintable(), "a message is one line"
        return None
    assert not kind.write(value) or kind.parse(kind.write(value)) == value
    return value


PARSERS: dict[bytes, Callable[[bytes], bool]] = {b"c": _configuration, b"d": _destination, b"p": _ports}


def main() -> None:
    """Run libFuzzer, which ends the process."""
    if atheris is None:
        sys.exit("this needs atheris: pip install 'atheris>=2.3'")
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    if not any(option.startswith(("-runs=", "-max_total_time=")) for option in options):
        options.append(RUNS)
    # libFuzzer writes what it finds interesting into the first folder.
    atheris.Setup([sys.argv[0], *options, MOST, tempfile.mkdtemp(prefix="fuzz-"), str(CORPUS)], feed_any)
    atheris.Fuzz()


def feed_any(data: bytes) -> None:
    """An input of libFuzzer's; its first byte is any."""
    feed(b"cdp"[data[0] % 3 :][:1] + data[1:] if data and data[:1] not in PARSERS else data)


if __name__ == "__main__":
    main()
