"""From argv, environment and a real file to Settings: precedence, origins, and every way to be wrong."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rows import Seen

import tproxy_relay
from tproxy_relay.config import conf_file, loader
from tproxy_relay.config.loader import Loaded
from tproxy_relay.config.options import ARGUMENTS, OPTIONS
from tproxy_relay.errors import ConfigError, RelayError, UsageError
from tproxy_relay.settings import HostPort, Settings

NOWHERE = "/nonexistent/tproxy-relay.conf"

# Two texts for each option that a file can set, both other than the default where there are so many.
SAMPLES = {
    "ports": ("1,2", "3"),
    "bind": ("::1", "127.0.0.1"),
    "interface": ("eth0", "lo"),
    "mode": ("redirect", "tproxy"),
    "intercept-inbound": ("80,8000-8100", "443"),
    "intercept-outbound": ("1-1023", "80"),
    "inbound-port": ("15002", "1"),
    "outbound-port": ("15006", "2"),
    "backend": ("nft", "iptables-legacy"),
    "on-failure": ("closed", "open"),
    "route-table": ("7", "4294967295"),
    "route-priority": ("1", "32763"),
    "workers": ("2", "auto"),
    "cpu-affinity": ("on", "off"),
    "user": ("relay", "0"),
    "stall-timeout": ("0", "2.5"),
    "self-probe": ("0", "3600"),
    "preserve-source": ("address", "full"),
    "target": ("a:1", "[::1]:2"),
    "allow": ("10.0.0.0/8,[::1]:80", "192.0.2.7:22-25"),
    "deny": ("0.0.0.0/0", "[2001:db8::/32]:1-2,192.0.2.7"),
    "mark-mask": ("0x7", "224"),
    "client-congestion": ("reno", "bbr"),
    "upstream-congestion": ("cubic", "x-1_A"),
    "client-pacing": ("1", "4294967294"),
    "upstream-pacing": ("125000", "0"),
    "socket-buffer": ("4096", "0"),
    "max-connections": ("5", "auto"),
    "max-per-source": ("3", "4"),
    "max-rate-per-source": ("1", "0"),
    "when-full": ("evict", "refuse"),
    "connect-timeout": ("1.5", "2"),
    "idle-timeout": ("1", "2.25"),
    "half-close-timeout": ("1", "2"),
    "drain-timeout": ("0", "2"),
    "keepalive": ("0", "7"),
    "user-timeout": ("1", "2"),
    "admin": ("127.0.0.1:9106", "/run/a.sock"),
    "log-level": ("info", "error"),
    "log-format": ("json", "console"),
    "log-file": ("-x # y", "/var/log/relay.log"),
}

Load = Callable[..., Loaded]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(*argv, environ={}, file='text'): the text is the default file; None: there is none."""

    def run(*argv: str, environ: dict[str, str] | None = None, file: str | None = None) -> Loaded:
        path = tmp_path / "default.conf"
        if file is not None:
            path.write_text(file, encoding="utf-8")
        return loader.load(argv, environ or {}, default_file=str(path))

    return run


def refusal(load: Load, *argv: str, **sources: Any) -> RelayError:
    with pytest.raises(RelayError) as refused:
        load(*argv, **sources)
    assert str(refused.value).isprintable()
    return refused.value


def value_of(loaded: Loaded, name: str) -> object:
    return getattr(loaded.settings, OPTIONS[name].field)


def value_from(name: str, text: str) -> object:
    kind = OPTIONS[name].kind
    return kind.parse(text) if kind else text


# --- which source wins


def test_nothing_said_gives_the_defaults(load: Load) -> None:
    loaded = load()
    assert loaded.settings == Settings() and loaded.arguments == ARGUMENTS
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.files_read == () and loaded.warnings == () and not loaded.print_config


def test_there_is_a_sample_of_every_option() -> None:
    assert set(SAMPLES) == {name for name, option in OPTIONS.items() if option.in_file}


@pytest.mark.parametrize("name", SAMPLES)
def test_each_source_sets_each_option_and_the_stronger_one_wins(load: Load, tmp_path: Path, name: str) -> None:
    one, two = SAMPLES[name]
    variable = OPTIONS[name].variable

    from_file = load(file=f"\n{name} = {conf_file.quoted(one)}")
    assert value_of(from_file, name) == value_from(name, one)
    assert from_file.origins[name] == f"{tmp_path}/default.conf:2"

    from_environment = load(environ={variable: two})
    assert value_of(from_environment, name) == value_from(name, two)
    assert from_environment.origins[name] == f"environment variable {variable}"

    from_command_line = load(f"--{name}={one}", environ={variable: two})
    assert value_of(from_command_line, name) == value_from(name, one)
    assert from_command_line.origins[name] == "command line"


@pytest.mark.parametrize("name", SAMPLES)
def test_only_the_option_that_was_set_differs(load: Load, name: str) -> None:
    loaded = load(f"--{name}={SAMPLES[name][0]}")
    assert [other for other, origin in loaded.origins.items() if origin != "default"] == [name]
    changed: dict[str, Any] = {OPTIONS[name].field: value_of(loaded, name)}
    unlike_default = dataclasses.replace(Settings(), **changed)
    assert loaded.settings == unlike_default != Settings()


@pytest.mark.parametrize("spelling", [["-ports", "7"], ["-ports=7"], ["--ports", "7"], ["--ports=7"]])
def test_both_spellings(load: Load, spelling: list[str]) -> None:
    for argv in (
        spelling,
        [*spelling, "run"],
        ["run", *spelling],
        ["-mode", "redirect", *spelling, "-keepalive=1"],
    ):
        loaded = load(*argv, environ={"TPROXY_RELAY_PORTS": "8"}, file="ports = 9")
        assert loaded.settings.ports == (7,)


def test_the_last_one_on_the_command_line_counts(load: Load) -> None:
    assert load("--ports", "1", "-ports=2").settings.ports == (2,)


def test_an_option_of_one_place_leaves_the_others_in_force(load: Load) -> None:
    loaded = load("-ports", "1", environ={"TPROXY_RELAY_BIND": "::1", "LOG_LEVEL": "INFO"}, file="target = a:1")
    assert loaded.settings == Settings(ports=(1,), bind=("::1",), target=HostPort("a", 1), log_level="info")
    assert loaded.origins["log-level"] == "environment variable LOG_LEVEL"


def test_a_list_in_brackets(load: Load) -> None:
    assert load(file="ports = [15002, 15006]").settings.ports == (15002, 15006)


def test_commands(load: Load) -> None:
    assert load("demo").arguments["command"] == "demo"
    assert load("demo", "--keep").arguments["keep"] is True
    assert load("--log-level", "info", "run").origins["command"] == "command line"
    loaded = load("--keep", "-ports", "1", "demo", "-bind=::1", environ={"LOG_LEVEL": "info"})
    assert loaded.arguments == {**ARGUMENTS, "command": "demo", "keep": True}


def test_rules_take_another_word(load: Load) -> None:
    for argv in (
        ["rules", "remove", "--json"],
        ["-keepalive", "1", "rules", "-json", "remove"],
        ["-json", "rules", "remove"],
    ):
        loaded = load(*argv)
        assert loaded.arguments == {**ARGUMENTS, "command": "rules", "action": "remove", "json": True}
        assert loaded.origins["action"] == "command line"
    assert load("check", "-json").arguments["action"] is None


def test_print_config_is_passed_on(load: Load) -> None:
    assert load("-print-config").print_config


# --- which file


def test_a_named_file_replaces_the_default_one(load: Load, tmp_path: Path) -> None:
    other = tmp_path / "other.conf"
    other.write_text("keepalive = 1")
    for argv in (["--config", str(other)], [f"-config={other}"]):
        loaded = load(*argv, file="ports = 1")
        assert loaded.settings == Settings(keepalive=1)
        assert loaded.files_read == (str(other),)


def test_the_environment_can_name_the_file_and_the_command_line_wins(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("keepalive = 1")
    (tmp_path / "b").write_text("keepalive = 2")
    environ = {"TPROXY_RELAY_CONFIG": str(tmp_path / "a")}
    assert load(environ=environ).settings.keepalive == 1
    assert load("--config", str(tmp_path / "b"), environ=environ).settings.keepalive == 2
    assert load(environ={"TPROXY_RELAY_CONFIG": ""}, file="keepalive = 3").settings.keepalive == 3


def test_a_named_file_must_exist(load: Load, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    by_option = refusal(load, "--config", str(missing))
    by_variable = refusal(load, environ={"TPROXY_RELAY_CONFIG": str(missing)})
    for error in (by_option, by_variable):
        assert isinstance(error, ConfigError)
        assert str(error) == f"cannot read {missing}: No such file or directory"


def test_a_file_that_cannot_be_used_is_an_error_even_when_nobody_named_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        loader.load([], {}, default_file=str(tmp_path))


def test_a_path_is_not_a_pattern(load: Load, tmp_path: Path) -> None:
    (tmp_path / "[ab]*.conf").write_text("keepalive = 1")
    assert load("--config", str(tmp_path / "[ab]*.conf")).settings.keepalive == 1


def test_dev_null_is_no_file(load: Load) -> None:
    assert load("--config", "/dev/null", file="ports = x").settings == Settings()


# --- what is refused


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--ports", "1,x"], "--ports: 'x' is not a TCP port (1-65535) in '1,x'"),
        (["-ports=0"], "--ports: '0' is not a TCP port (1-65535)"),
        (["--ports", ""], "--ports: no value given"),
        (["--ports"], "--ports: expected one argument"),
        (["--keepalive", "-1"], "--keepalive: '-1' is not a whole number from 0 to 32767"),
        (["-port", "9"], "unknown option '-port' (did you mean '--ports'?)"),
        (["--port=9"], "unknown option '--port' (did you mean '--ports'?)"),
        (["-prots", "9"], "unknown option '-prots' (did you mean '--ports'?)"),
        (["--prots=a b"], "unknown option '--prots' (did you mean '--ports'?)"),
        (["-p", "9"], "unknown option '-p'"),
        (["-p9"], "unknown option '-p9'"),
        (["-c", "/x"], "unknown option '-c'"),
        (
            ["--connect_timeout", "9"],
            "unknown option '--connect_timeout' (did you mean '--connect-timeout'?)",
        ),
        (["--command", "run"], "unknown option '--command'"),
        (["--log-file", "-x"], "unknown option '-x'"),
        (["---ports", "1"], "unknown option '---ports' (did you mean '--ports'?)"),
        (["--log-file=--"], "--log-file: '--' is not the name of a file"),
        (["--ports=--"], "--ports: '--' is not a TCP port (1-65535)"),
        (["--config="], "--config: '' is not the name of a file"),
        (["walk"], "command: 'walk' is not one of run, status, sessions, top, check, rules, install, uninstall, demo"),
        ([""], "command: '' is not one of run, status, sessions, top, check, rules, install, uninstall, demo"),
        (["rules", "show", "apply"], "unexpected argument 'apply'"),
        (["run", "demo"], "action: 'demo' is not one of show, apply, remove, status"),
        (["run", "--", "--ports=1"], "action: '--ports=1' is not one of show, apply, remove, status"),
        (["rules", "show", "--", "--ports=1"], "unexpected argument '--ports=1'"),
        (["--action", "show"], "unknown option '--action'"),
        (
            ["rules", "-json"],
            "'rules' needs one more word: show, apply, remove or status (command: command line)",
        ),
        (
            ["-json", "run"],
            "--json is for 'status', 'sessions', 'rules' and 'check', and the command is 'run' "
            "(json: command line, command: command line)",
        ),
        (["--keep=yes", "demo"], "--keep: ignored explicit argument 'yes'"),
        (
            ["--keep"],
            "--keep is for 'demo', and the command is 'run': drop --keep or say demo "
            "(keep: command line, command: default)",
        ),
    ],
)
def test_a_wrong_command_line(load: Load, argv: list[str], message: str) -> None:
    error = refusal(load, *argv)
    assert isinstance(error, UsageError) and error.exit_code == 2
    assert str(error) == message


def test_a_wrong_environment(load: Load) -> None:
    error = refusal(load, environ={"TPROXY_RELAY_CONNECT_TIMEOUT": "x"})
    assert isinstance(error, ConfigError) and error.exit_code == 78
    assert str(error) == "environment variable TPROXY_RELAY_CONNECT_TIMEOUT: 'x' is not a number of seconds"


def test_a_wrong_file(load: Load, tmp_path: Path) -> None:
    error = refusal(load, file="\nprots = 1")
    assert isinstance(error, ConfigError) and error.exit_code == 78
    assert str(error) == f"{tmp_path}/default.conf:2: unknown setting 'prots' (did you mean 'ports'?)"


def test_a_wrong_value_is_refused_even_where_a_stronger_one_hides_it(load: Load) -> None:
    assert isinstance(refusal(load, "-ports", "1", file="ports = x"), ConfigError)
    assert isinstance(refusal(load, "-ports", "1", environ={"TPROXY_RELAY_PORTS": "x"}), ConfigError)


def test_a_contradiction_is_the_command_lines_fault_only_if_that_took_part(load: Load, tmp_path: Path) -> None:
    error = refusal(load, file="target = 127.0.0.1:15002")
    assert isinstance(error, ConfigError)
    assert f"target: {tmp_path}/default.conf:1" in str(error)
    assert isinstance(refusal(load, "--ports=9", file="target = 127.0.0.1:9"), UsageError)


def test_warnings(load: Load) -> None:
    environ = {"TPROXY_RELAY_PROTS": "1", "TPROXY_RELAY_MAX_PER_SOURCE": "2"}
    assert load("--max-connections=1", environ=environ).warnings == (
        "TPROXY_RELAY_PROTS in the environment is ignored: " "no such setting (did you mean 'TPROXY_RELAY_PORTS'?)",
        "max-per-source 2 has no effect: max-connections 1 is reached first",
    )


@pytest.mark.row("S12", "the configuration file can be changed by any account", "a warning that names the remedy")
def test_a_file_that_anybody_may_change(load: Load, tmp_path: Path, seen: Seen) -> None:
    path = tmp_path / "open.conf"
    path.write_text("keepalive = 1", encoding="utf-8")
    path.chmod(0o666)
    assert load("--config", str(path)).warnings == (f"{path} can be changed by any account: chmod o-w {path}",)
    path.chmod(0o664)
    assert load("--config", str(path)).warnings == ()
    seen("warned")


# --- --help and --version


@pytest.mark.parametrize("flag", ["-h", "-help", "--help"])
def test_help_needs_no_good_configuration(load: Load, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with pytest.raises(SystemExit) as ended:
        load(flag, environ={"TPROXY_RELAY_PORTS": "x"}, file="[nonsense]")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: tproxy-relay [run | check | demo] [options]\n")


@pytest.mark.parametrize("flag", ["-version", "--version"])
def test_version(load: Load, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with pytest.raises(SystemExit) as ended:
        load(flag, file="[nonsense]")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tproxy-relay {tproxy_relay.__version__}\n"


# --- --print-config


def test_print_config_shows_each_value_and_its_origin(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "default.conf"
    printed = loader.print_config(load("-keepalive=7", environ={"LOG_FORMAT": "json"}, file="ports = [1, 2]"))
    lines = [re.sub(r"  +", "  ", line) for line in printed.splitlines()]
    assert lines[0] == f"# Read from {path}."
    assert f"ports = 1,2  # {path}:1" in lines
    assert "keepalive = 7  # command line" in lines
    assert "log-format = json  # environment variable LOG_FORMAT" in lines
    assert "connect-timeout = 10  # default" in lines
    assert "max-connections = auto  # default" in lines
    assert "# interface =  # default: all interfaces" in lines
    assert "# command = run  # default" in lines
    assert "# keep = no  # default" in lines
    assert len(lines) == 1 + len([option for option in OPTIONS.values() if option.has_value])


def test_print_config_says_when_no_file_was_read(load: Load) -> None:
    assert loader.print_config(load()).startswith("# No configuration file was read.\n")


def test_print_config_survives_a_path_with_a_newline(load: Load, tmp_path: Path) -> None:
    strange = tmp_path / "a\nports = 9\n"
    strange.write_text("keepalive = 1")
    with pytest.raises(UsageError, match="cannot be printed"):
        load("--config", str(strange))
    loaded = loader.load([], {}, default_file=str(strange))
    (tmp_path / "b").write_text(loader.print_config(loaded))
    assert load("--config", str(tmp_path / "b")).settings == Settings(keepalive=1)


# --- whatever comes

PIECES = st.sampled_from(
    [
        b"ports",
        b"=",
        b" = ",
        b"\n",
        b"1",
        b"\xff",
        b"\0",
        b"[",
        b"]",
        b"log-file",
        b'"',
        b"#",
        b"--",
        b"\xef\xbb\xbf",
    ]
)


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.binary() | st.lists(PIECES).map(b"".join))
def test_any_bytes_in_a_file_are_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.conf"
    path.write_bytes(data)
    try:
        assert isinstance(loader.load(["--config", str(path)], {}), Loaded)
    except ConfigError as refused:
        assert str(refused).isprintable()


WORDS = st.sampled_from(
    [
        "run",
        "demo",
        "rules",
        "show",
        "-json",
        "--",
        "-",
        "-h",
        "--help",
        "-version",
        "--keep",
        "--ports",
        "-ports=1",
        "-bind",
        "::",
        "-1",
        "--log-file",
        "--log-file=",
        "--log-file=--",
        "--config",
        NOWHERE,
        "-print-config",
        "--target=a:1",
        "-p",
        "\udcff",
        "-\0",
        "a b",
        "-h x",
        "--ports 1",
    ]
) | st.text(max_size=5)
VARIABLES = st.sampled_from(
    [
        "TPROXY_RELAY_PORTS",
        "TPROXY_RELAY_LOG_FILE",
        "LOG_LEVEL",
        "TPROXY_RELAY_KEEP",
        "TPROXY_RELAY_X",
    ]
)


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=6), st.dictionaries(VARIABLES, st.text(max_size=5)))
def test_any_argv_and_environment_end_in_one_of_four_ways(argv: list[str], environ: dict[str, str]) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            assert isinstance(loader.load(argv, environ, default_file=NOWHERE), Loaded)
    except (UsageError, ConfigError) as refused:
        assert str(refused).isprintable()
    except SystemExit as ended:
        assert ended.code == 0
