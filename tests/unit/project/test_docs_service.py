"""The page on the service says what the init script does: its verbs and its exit codes."""

import ast
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "etc/init.d/tproxy-relay"
TEXT = SCRIPT.read_text()
PAGE = (ROOT / "docs/service.rst").read_text()
SECTION = PAGE[PAGE.index("Init script\n") : PAGE.index("\nsystemd\n")]
WORDS = " ".join(SECTION.split())


def usage() -> list[str]:
    found = re.search(r"\{([a-z|-]+)\}", TEXT)
    assert found
    return found[1].split("|")


def test_every_verb_is_documented_in_order() -> None:
    assert re.findall(r"^``([a-z-]+)`` ", SECTION, re.MULTILINE) == usage()


def test_every_verb_of_the_usage_is_taken_and_no_other() -> None:
    found = re.search(r"case \$verb in\n +([a-z| -]+)\) ;;", TEXT)
    assert found and found[1].split(" | ") == usage()


def test_every_exit_code_is_documented() -> None:
    """Those of status apart from the others, as in the LSB."""
    status = TEXT[TEXT.index("status() {") : TEXT.index("check() {")]
    others = TEXT.replace(status, "")
    status_codes = set(re.findall(r"(?:code=|die )(\d)", status))
    codes = set(re.findall(r"(?:die|exit) (\d)", others)) | set(re.findall(r"return ([56])$", others, re.MULTILINE))
    told = re.search(r"are the LSB's: (.*?)\. ", WORDS)
    of_status = re.search(r"``status`` (.*?)\. ", WORDS)
    assert told and of_status
    assert set(re.findall(r"(\d) ", told[1].replace("(reload) ", ""))) == codes
    assert set(re.findall(r"(\d): ", of_status[1])) == status_codes
    header = re.search(r"# Exit codes are LSB's: (.*?);", TEXT, re.DOTALL)
    assert header and set(re.findall(r"(\d) ", header[1])) == codes


def test_the_header_of_the_init_script_is_whole() -> None:
    """Without one of these, update-rc.d and insserv complain."""
    header = TEXT[TEXT.index("### BEGIN INIT INFO\n") : TEXT.index("### END INIT INFO\n")]
    names = re.findall(r"^# ([A-Z][A-Za-z-]+): +\S", header, re.MULTILINE)
    assert names[0] == "Provides"
    assert {"Required-Start", "Required-Stop", "Default-Start", "Default-Stop", "Short-Description"} <= set(names)


def test_shellcheck(require_or_skip: Callable[[str], NoReturn]) -> None:
    if shutil.which("shellcheck") is None:
        require_or_skip("there is no shellcheck here")
    command = ["shellcheck", "--shell=sh", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_refusals_that_the_script_recognizes_are_those_of_the_program() -> None:
    """start-stop-daemon keeps the exit code of a background process to itself, so the script reads what it has said."""
    patterns = TEXT[TEXT.index("case $why in") : TEXT.index("*) return 1 ;;")]
    sentences = re.findall(r'process \$old: ([^"]+)"', patterns) + re.findall(r"'([^']+)'", patterns)
    assert len(sentences) == 4
    said = [
        node.value
        for path in (ROOT / "tproxy_relay").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for sentence in sentences:
        assert any(sentence in text for text in said), f"nothing says {sentence!r}"
