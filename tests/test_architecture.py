"""Machine-checkable rules: sizes, imports, the environment, import side effects, test docstrings."""

from __future__ import annotations

import ast
import io
import itertools
import re
import statistics
import subprocess
import sys
import tokenize
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "stable_diffusion_server"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
ALL = [*MODULES, *TESTS, *ROOT.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "training").rglob("*.py")]

MODULE_FLOOR, MODULE_CAP, MODULE_MEDIAN, FUNCTION_CAP, FUNCTION_P90 = 40, 320, 120, 60, 30
# Name → why it may be longer than the cap.
LONGER_MODULES: dict[str, str] = {}
LONGER_FUNCTIONS: dict[str, str] = {}
_INTERFACE = "a protocol that two packages share and neither may import from the other"
_LEAF = "several modules import it, and each of them has another subject"
_PATH = "the path is fixed: Python's entry point, or one that the first version of this server had"
_PART = "one part of a class or a page whose main module has no lines left for it"
# Path in the package → why it may be shorter than the floor.
SHORTER_MODULES: dict[str, str] = {
    "__main__.py": _PATH,
    "bucket_api.py": _PATH,
    "image_processing.py": _PATH,
    "files/damaged_files.py": _LEAF,
    "files/folder_walk.py": _LEAF,
    "imaging/edges.py": _LEAF,
    "jobs/ids.py": _LEAF,
    "jobs/store/claims.py": _PART,
    "parsing/unicode_text.py": _LEAF,
    "pipelines/upscaling/compact.py": "the trainer imports it without the reader of files",
    "settings/base.py": _LEAF,
    "settings/observability.py": "one group of settings, as the docs table has it",
    "ui/sessions.py": _PART,
}
# Packages whose modules share names on purpose: dialects, bucket backends, model families, UI tabs.
PARALLEL = {"api/openai", "api/automatic1111", "storage/s3", "storage/gcs", "pipelines/families", "ui/tabs", "ui/html"}


@cache
def text_of(path: Path) -> str:
    return path.read_text()


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All nodes of a file, the module first, parsed once for all tests of a worker."""
    return list(ast.walk(ast.parse(text_of(path), str(path))))


def tree_of(path: Path) -> ast.Module:
    module = nodes_of(path)[0]
    assert isinstance(module, ast.Module)
    return module


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions_of(path: Path) -> list[tuple[str, int]]:
    nodes = [node for node in nodes_of(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(f"{name_of(path)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1) for node in nodes]


def test_no_module_outgrows_a_readers_sitting() -> None:
    """Cap and median of module length; longer ones are listed with a reason."""
    lengths = {name_of(path): len(text_of(path).splitlines()) for path in MODULES}
    assert {name for name, lines in lengths.items() if lines > MODULE_CAP} == set(LONGER_MODULES)
    assert statistics.median(lengths.values()) <= MODULE_MEDIAN


def test_no_module_is_a_crumb() -> None:
    """A module under the minimum length is listed with a reason; a listed one that has grown leaves the list."""
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(text_of(path).splitlines())
        for path in MODULES
        if path.name != "__init__.py"
    }
    short = {name for name, lines in lengths.items() if lines < MODULE_FLOOR}
    assert short - set(SHORTER_MODULES) == set(), "merge these modules into one of the same subject, or give a reason"
    assert {name for name in SHORTER_MODULES if lengths.get(name, 0) >= MODULE_FLOOR} == set(), "no longer short"


def is_parallel(path: Path) -> bool:
    return path.parent.relative_to(PACKAGE).as_posix() in PARALLEL


def test_a_module_name_means_one_module_in_its_package() -> None:
    """Within a top-level package no two modules share a basename, parallel packages excepted."""
    places: dict[tuple[str, str], list[str]] = {}
    for path in MODULES:
        if path.name != "__init__.py" and not is_parallel(path):
            places.setdefault((path.relative_to(PACKAGE).parts[0], path.name), []).append(name_of(path))
    assert [names for names in places.values() if len(names) > 1] == []


def test_a_class_name_means_one_class() -> None:
    """Public class names are unique across the package, parallel packages excepted."""
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not is_parallel(path):
                places.setdefault(node.name, []).append(name_of(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_test_files_have_names_of_their_own() -> None:
    """Pytest imports test modules by their basename, since there are no packages among the tests."""
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert {name for name in names if names.count(name) > 1} == set()


@pytest.mark.parametrize("face", sorted(PACKAGE.rglob("__init__.py")), ids=name_of)
def test_every_package_has_a_face(face: Path) -> None:
    """A package has a docstring and, unless only its parent uses it, an `__all__`."""
    tree = tree_of(face)
    assert ast.get_docstring(tree)
    if face.parent.parent != PACKAGE:
        return
    assigned = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert "__all__" in assigned


def contract(name: str) -> dict[str, list[str]]:
    contracts = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    return next(found for found in contracts if found["name"] == name)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("Only pipelines imports torch", {"pipelines"}),
        ("Only api, ui and app import FastAPI", {"api", "ui", "app", "cli", "__main__"}),
    ],
)
def test_the_contracts_on_libraries_name_every_package(name: str, allowed: set[str]) -> None:
    """A new top-level module or package must be added to both contracts, or it would be free to import anything."""
    every = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    named = {module.removeprefix("stable_diffusion_server.") for module in contract(name)["source_modules"]}
    assert every - allowed == named


def test_the_fast_tests_load_no_model_library_and_no_browser() -> None:
    """`make check` stays fast: a module that needs torch or a browser says `pytestmark = pytest.mark.slow`."""
    code = """
import sys, pytest
class Loaded:
    seen = set()
    def pytest_collectreport(self, report):
        new = {name for name in ("torch", "diffusers", "playwright") if name in sys.modules} - self.seen
        self.seen |= new
        for name in sorted(new): print(f"LOADED {report.nodeid} imports {name}")
    def pytest_collection_finish(self, session):
        print("COLLECTED", len(session.items))
pytest.main(["--collect-only", "-qq", "-m", "not slow", "-p", "no:cacheprovider"], plugins=[Loaded()])
"""
    lines = run(code).splitlines()
    assert [line for line in lines if line.startswith("LOADED")] == []
    assert int(next(line for line in lines if line.startswith("COLLECTED")).split()[1]) > 1000


def test_no_function_outgrows_a_screen() -> None:
    """Cap and 90th percentile of function length; longer ones are listed with a reason."""
    lengths = dict(itertools.chain.from_iterable(functions_of(path) for path in MODULES))
    assert {name for name, lines in lengths.items() if lines > FUNCTION_CAP} == set(LONGER_FUNCTIONS)
    assert sorted(lengths.values())[int(len(lengths) * 0.9)] <= FUNCTION_P90


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_module_opens_with_a_sentence(path: Path) -> None:
    """Every module has a docstring."""
    assert (ast.get_docstring(tree_of(path)) or "").strip()


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_test_states_the_truth_it_proves(path: Path) -> None:
    """Each test function has a docstring."""
    tests = [
        node
        for node in nodes_of(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert [node.name for node in tests if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_settings_reads_the_environment(path: Path) -> None:
    """No os.environ and no getenv elsewhere: configuration is read once, at the root, and passed down."""
    if path.parent.name == "settings":
        return
    used = {node.attr for node in nodes_of(path) if isinstance(node, ast.Attribute)}
    assert not used & {"environ", "getenv", "environb"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_imported_by_string(path: Path) -> None:
    """import-linter cannot see such imports, so there are none."""
    names = {node.id for node in nodes_of(path) if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes_of(path) if isinstance(node, ast.Attribute)}
    assert not names & {"__import__", "import_module"}


PURE = (
    "imaging/canvas.py imaging/masks.py imaging/encode.py imaging/resize.py imaging/artifact_detection.py "
    "imaging/formats.py imaging/metadata.py generation/layout.py generation/resolver.py "
    "generation/prompts.py generation/single_flight.py generation/provenance.py generation/results.py "
    "storage/object_headers.py storage/history/entries.py net/public_ip.py net/url_policy.py "
    "pipelines/catalog.py types/generation.py types/guidance.py types/requests.py types/results.py"
).split()
IO_MODULES = {"os", "pathlib", "socket", "subprocess", "shutil", "tempfile", "sqlite3", "httpx", "requests", "boto3"}


@pytest.mark.parametrize("module", PURE)
def test_the_middle_is_pure(module: str) -> None:
    """The modules of pure functions import nothing with side effects."""
    imported: set[str] = set()
    for node in nodes_of(PACKAGE / module):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert not imported & IO_MODULES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_constants_stand_above_the_first_function_or_class(path: Path) -> None:
    """Except those that are made from one; so a reader finds all limits of a module in one place."""
    late, made, begun = [], set(), False
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made, begun = made | {node.name}, True
        elif begun and isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
            used = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
            late += [] if used & made else sorted(names)
            made |= names
    assert late == []


SUPPRESSION = re.compile(r"#\s*(noqa|type:\s*ignore|pragma)\b")
REASONED = re.compile(r"#\s*(noqa: [A-Z0-9, ]+|type: ignore\[[a-z-]+\]|pragma: no cover)\s+#\s+\S+")


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_suppression_carries_its_reason_and_nothing_is_left_to_do(path: Path) -> None:
    """A suppressed rule has a reason on its line; a TODO belongs in an issue, not in a comment."""
    lines = io.StringIO(text_of(path)).readline
    comments = [token.string for token in tokenize.generate_tokens(lines) if token.type == tokenize.COMMENT]
    assert [comment for comment in comments if SUPPRESSION.search(comment) and not REASONED.search(comment)] == []
    assert [comment for comment in comments if re.search(r"\b(TODO|FIXME|HACK|XXX)\b", comment)] == []


def run(code: str) -> str:
    done = subprocess.run(  # noqa: S603  # our own interpreter on a program written here
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280, check=True
    )
    return done.stdout.strip()


def test_importing_the_package_does_nothing() -> None:
    """No thread, no file written, no torch: importing every package but the pipelines has no side effects."""
    modules = [
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
for module in {modules!r}: importlib.import_module(module)
print(sorted(set(sys.modules) & {{"torch", "diffusers", "transformers", "gradio"}}), opened, threading.active_count())
"""
    assert run(code) == "[] [] 1"


def test_the_catalogue_is_read_without_torch() -> None:
    """Limits and defaults are available without seconds of imports."""
    code = "import stable_diffusion_server.pipelines.catalog, sys; print('torch' in sys.modules)"
    assert run(code) == "False"
