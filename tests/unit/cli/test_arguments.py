"""What is said to one command, from the command line to the field."""

import dataclasses

import pytest

from tproxy_relay.cli.arguments import Arguments
from tproxy_relay.config import loader
from tproxy_relay.config.options import ARGUMENTS

NOTHING_SAID = Arguments("run", None, False, False, "/", (), None, False)


def arguments_of(*argv: str) -> Arguments:
    return Arguments(**loader.load(argv, {}, default_file="/dev/null").arguments)


def test_each_field_has_an_option_and_each_option_a_field() -> None:
    assert [field.name for field in dataclasses.fields(Arguments)] == list(ARGUMENTS)
    assert arguments_of() == NOTHING_SAID


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("run", "--take-over"), {"take_over": True}),
        (("demo", "--keep"), {"command": "demo", "keep": True}),
        (
            ("rules", "show", "--json", "--intercept-inbound", "80"),
            {"command": "rules", "action": "show", "json": True},
        ),
        (("install", "--root", "/mnt"), {"command": "install", "root": "/mnt"}),
        (("sessions", "--show", "port=80"), {"command": "sessions", "show": (("port", "80"),)}),
        (("sessions", "--abort", "1-2-3"), {"command": "sessions", "abort": "1-2-3"}),
    ],
)
def test_every_one_of_them_arrives(argv: tuple[str, ...], said: dict[str, object]) -> None:
    assert arguments_of(*argv) == dataclasses.replace(NOTHING_SAID, **said)  # type: ignore[arg-type]


def test_they_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NOTHING_SAID.keep = True  # type: ignore[misc]
