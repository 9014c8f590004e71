"""The house rules that a machine can check: sizes, imports, the environment, what importing does, test sentences."""

from __future__ import annotations

import ast
import itertools
import re
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "stable_diffusion_server"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
ALL = [*MODULES, *TESTS, *ROOT.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "training").rglob("*.py")]

MODULE_CAP, MODULE_MEDIAN, FUNCTION_CAP, FUNCTION_P90 = 320, 120, 60, 30
# Name → why it may be longer than the cap.
LONGER_MODULES: dict[str, str] = {}
LONGER_FUNCTIONS: dict[str, str] = {}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions_of(path: Path) -> list[tuple[str, int]]:
    nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(f"{name_of(path)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1) for node in nodes]


def test_no_module_outgrows_a_readers_sitting() -> None:
    """Cap and median of module length; longer ones are listed with a reason."""
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name for name, lines in lengths.items() if lines > MODULE_CAP} == set(LONGER_MODULES)
    assert statistics.median(lengths.values()) <= MODULE_MEDIAN


def test_no_function_outgrows_a_screen() -> None:
    """Cap and 90th percentile of function length; longer ones are listed with a reason."""
    lengths = dict(itertools.chain.from_iterable(functions_of(path) for path in MODULES))
    assert {name for name, lines in lengths.items() if lines > FUNCTION_CAP} == set(LONGER_FUNCTIONS)
    assert sorted(lengths.values())[int(len(lengths) * 0.9)] <= FUNCTION_P90


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_module_opens_with_a_sentence(path: Path) -> None:
    """A reader who comes in cold is told what the room is for."""
    assert (ast.get_docstring(tree_of(path)) or "").strip()


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_test_states_the_truth_it_proves(path: Path) -> None:
    """Each test function has a docstring."""
    tests = [
        node
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert [node.name for node in tests if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_settings_reads_the_environment(path: Path) -> None:
    """No os.environ and no getenv elsewhere: configuration is read once, at the root, and handed down."""
    if path.parent.name == "settings":
        return
    used = {node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
    assert not used & {"environ", "getenv", "environb"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_imported_by_string(path: Path) -> None:
    """import-linter cannot see such imports, so there are none."""
    names = {node.id for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
    assert not names & {"__import__", "import_module"}


PURE = (
    "imaging/canvas.py imaging/masks.py imaging/encode.py imaging/resize.py imaging/artifact_detection.py "
    "imaging/formats.py imaging/metadata.py generation/layout.py generation/resolver.py "
    "generation/prompts.py generation/single_flight.py generation/provenance.py generation/results.py "
    "storage/object_headers.py storage/history/entries.py net/public_ip.py net/url_policy.py "
    "pipelines/catalog.py types/requests.py types/diffusion.py types/results.py types/events.py"
).split()
IO_MODULES = {"os", "pathlib", "socket", "subprocess", "shutil", "tempfile", "sqlite3", "httpx", "requests", "boto3"}


@pytest.mark.parametrize("room", PURE)
def test_the_middle_is_pure(room: str) -> None:
    """The rooms that are functions from values to values import nothing that touches the world."""
    imported: set[str] = set()
    for node in ast.walk(tree_of(PACKAGE / room)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert not imported & IO_MODULES


SUPPRESSION = re.compile(r"#\s*(noqa|type:\s*ignore|pragma)\b")
REASONED = re.compile(r"#\s*(noqa: [A-Z0-9, ]+|type: ignore\[[a-z-]+\]|pragma: no cover)\s+#\s+\S+")


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_suppression_carries_its_reason_and_nothing_is_left_to_do(path: Path) -> None:
    """A silenced rule says why on its line; a wish is an issue and not a comment."""
    with path.open("rb") as file:
        comments = [token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    assert [comment for comment in comments if SUPPRESSION.search(comment) and not REASONED.search(comment)] == []
    assert [comment for comment in comments if re.search(r"\b(TODO|FIXME|HACK|XXX)\b", comment)] == []


def run(code: str) -> str:
    done = subprocess.run(  # noqa: S603  # our own interpreter on a program written here
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_importing_the_package_does_nothing() -> None:
    """No thread, no file written, no torch: every room but the pipelines is imported and nothing happens."""
    rooms = [
        name_of(path)[:-3].replace("/", ".").removesuffix(".__init__")
        for path in MODULES
        if not re.search(r"pipelines/|ui/tabs/", name_of(path)) and path.name != "__main__.py"
    ]
    code = f"""
import builtins, importlib, sys, threading
opened, original = [], builtins.open
def watch(file, mode="r", *more, **named):
    if set(mode) & set("wax+"): opened.append(str(file))
    return original(file, mode, *more, **named)
sys.dont_write_bytecode = True
builtins.open = watch
for room in {rooms!r}: importlib.import_module(room)
print(sorted(set(sys.modules) & {{"torch", "diffusers", "transformers", "gradio"}}), opened, threading.active_count())
"""
    assert run(code) == "[] [] 1"


def test_the_catalogue_is_read_without_torch() -> None:
    """Limits and defaults are known before, and without, seconds of imports."""
    code = "import stable_diffusion_server.pipelines.catalog, sys; print('torch' in sys.modules)"
    assert run(code) == "False"
