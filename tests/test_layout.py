"""The shape of the code base, read off its syntax trees: imports run one way, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ddpm_fast"
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
ENGINE = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "kernels"]
OURS = [*ENGINE, *KERNELS, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "bench").rglob("*.py"))]

ROOMS = [
    "errors",
    "constants",
    "stages",
    "config",
    "options",
    "presets",
    "flags",
    "files",
    "progress",
    "textbook",
    "diffusion",
    "ops",
]
ROOMS += ["model", "engine", "quality", "runs", "planning", "checks", "launch", "api", "cli", "__main__", "__init__"]
"""From left to right: a room imports itself and what is left of it."""
NO_MORE_THAN = {
    "data": {"data", "errors", "config", "files", "progress", "diffusion.noise"},
    "quality": {"quality", "errors", "files", "progress", "config", "data"},
}
"""What these rooms import at most; the engine and what is right of it may import data."""


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere, late imports too, as dotted names (from a import b gives a.b)."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(path: Path) -> set[str]:
    """What a file imports of the package, without the package's name: "diffusion.noise.Stream"."""
    return {name.removeprefix("ddpm_fast.") for name in imported(path) if name.startswith("ddpm_fast.")}


def room(name: str) -> str:
    return name.partition(".")[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """Names left when modules that import nothing left are taken away, again and again."""
    left = dict(edges)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_the_tests_see_the_engine():
    assert {"config", "diffusion.noise", "model.unet", "ops"} <= {module_of(path) for path in ENGINE}
    assert own(PACKAGE / "model" / "unet.py") >= {"model.blocks.ResBlock"}
    assert cycles({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("path", ENGINE, ids=module_of)
def test_imports_run_one_way(path):
    here = room(module_of(path))
    for name in own(path):
        if here in NO_MORE_THAN:
            assert any(f"{name}.".startswith(f"{allowed}.") for allowed in NO_MORE_THAN[here]), name
        elif room(name) == "data":
            assert ROOMS.index(here) >= ROOMS.index("engine"), name
        elif room(name) in ROOMS:
            assert ROOMS.index(room(name)) <= ROOMS.index(here), name


def test_no_two_modules_import_each_other():
    modules = {module_of(path) for path in ENGINE}
    edges = {}
    for path in ENGINE:
        names = own(path) | {name.rpartition(".")[0] for name in own(path)}
        edges[module_of(path)] = (names & modules) - {module_of(path)}
    assert cycles(edges) == []


def test_the_textbook_stands_alone():
    assert {room(name) for name in own(PACKAGE / "textbook.py")} == {"config"}
    importers = [module_of(path) for path in ENGINE if any(room(name) == "textbook" for name in own(path))]
    assert [name for name in importers if room(name) != "checks"] == []


def test_rooms_re_export_nothing():
    for path in PACKAGE.glob("*/__init__.py"):
        assert path.parent.name == "ops" or path.read_text() == "", path


BENCH = ["timing", "work", "peers", "report"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench").glob("*/*.py")), ids=lambda path: f"{path.parent.name}.{path.stem}"
)
def test_imports_of_bench_run_one_way(path):
    for name in imported(path):
        here, there = path.parent.name, name.split(".")[1] if name.startswith("bench.") else ""
        if here in BENCH and there in BENCH:
            assert BENCH.index(there) <= BENCH.index(here), name


def test_only_fused_ops_import_kernels():
    assert [module_of(path) for path in ENGINE if "kernels" in map(room, own(path))] == ["ops.fused"]


@pytest.mark.parametrize("path", [*ENGINE, *KERNELS], ids=lambda path: path.stem)
def test_engine_imports_neither_tests_nor_bench_and_never_pickles(path):
    forbidden = {"tests", "bench", "pickle", "dill", "cloudpickle", "shelve"}
    assert not {name.split(".")[0] for name in imported(path)} & forbidden
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.save"), f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False", f"line {node.value.lineno}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_torch_triton_constants_and_each_other_only(path):
    for name in imported(path):
        standard = name.split(".")[0] in sys.stdlib_module_names
        assert standard or name.startswith(("torch", "triton", "ddpm_fast.kernels", "ddpm_fast.constants")), name


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_no_bare_kernels_are_imported(path):
    assert len(path.read_text().splitlines()) <= 300
    assert "kernels" not in {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("module", ["ddpm_fast", "ddpm_fast.config", "ddpm_fast.constants"])
def test_importing_the_package_or_its_configuration_needs_no_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'triton', 'numpy'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
