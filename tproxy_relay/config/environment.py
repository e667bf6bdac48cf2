"""What the environment sets: TPROXY_RELAY_<NAME>, and LOG_LEVEL and LOG_FORMAT without the prefix.

A variable that is empty counts as not set, for compose files and unit files like to write ``NAME=``. A
TPROXY_RELAY_ variable that nobody knows is only worth a warning: it may be meant for another version.
"""

from collections.abc import Iterator, Mapping

from tproxy_relay.config.conf_file import Given
from tproxy_relay.config.option_types import BadValue
from tproxy_relay.config.options import OPTIONS, PREFIX, Option, did_you_mean
from tproxy_relay.errors import ConfigError

_KNOWN = {variable: option for option in OPTIONS.values() for variable in option.variables}


def gather(environ: Mapping[str, str]) -> dict[str, Given]:
    """What the environment sets, by name of the option. Raises ConfigError for a value that is none."""
    found = {name: _first_of(option, environ) for name, option in OPTIONS.items()}
    return {name: given for name, given in found.items() if given}


def _first_of(option: Option, environ: Mapping[str, str]) -> Given | None:
    for variable in option.variables:
        if environ.get(variable):
            return _checked(option, Given(environ[variable], f"environment variable {variable}"))
    return None


def _checked(option: Option, given: Given) -> Given:
    try:
        if option.kind:
            option.kind.parse(given.text)
    except BadValue as error:
        raise ConfigError(f"{given.where}: {error}") from None
    return given


def warnings(environ: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each variable that looks like ours and is not."""
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in _KNOWN and environ[variable]:
            yield f"{_printable(variable)} in the environment is ignored: {_reason(variable)}"


def _reason(variable: str) -> str:
    name = variable.removeprefix(PREFIX).lower().replace("_", "-")
    if name in OPTIONS:
        return f"{name!r} is for the command line"
    return f"no such setting{did_you_mean(name, _KNOWN.values(), lambda option: option.variable)}"


def _printable(variable: str) -> str:
    return variable if variable.isprintable() else ascii(variable)
