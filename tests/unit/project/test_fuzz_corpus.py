"""The inputs that fuzzing began with and those that it found, played without a fuzzer (tests/fuzz/target.py)."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
CORPUS = sorted((FUZZ / "corpus").iterdir())


@pytest.fixture(scope="module")
def target() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_target", FUZZ / "target.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_it_is_accepted_or_refused_with_the_documented_error(target: ModuleType, path: Path) -> None:
    assert target.feed(path.read_bytes()) in (True, False)


def test_each_parser_accepts_some_and_refuses_some(target: ModuleType) -> None:
    seen = {(path.read_bytes()[:1], target.feed(path.read_bytes())) for path in CORPUS}
    assert seen == {(parser, answer) for parser in target.PARSERS for answer in (True, False)}


def test_the_corpus_is_small() -> None:
    assert len(CORPUS) < 50
    assert all(path.stat().st_size <= 400 for path in CORPUS)
