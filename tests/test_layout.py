"""The shape of the code base, read off its syntax trees: imports run one way, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = sorted((ROOT / "ddpm_fast").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
OURS = [*ENGINE, *KERNELS, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "bench").rglob("*.py"))]

# design.md, Layout: a module imports only from layers below its own, or from its own where the layer says so.
LAYERS = [
    {"config"},
    {"noise", "schedule", "execution", "capture", "narrow_groups"},
    {"samplers", "reference"},
    {"kernels"},
    {"ops"},
    {"blocks", "unet", "arrays", "pictures", "data", "batches", "checkpoint", "images", "distributed"},
    {"trainer", "loop", "run", "evaluate", "convert", "report", "check", "check_process", "check_kernels"},
    {"arguments", "commands", "cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


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


def siblings(path: Path) -> set[str]:
    """The modules of ddpm_fast that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("ddpm_fast.")}


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """Names left when modules that import nothing left are taken away, again and again."""
    left = dict(edges)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_the_tests_see_the_engine():
    assert {"config.py", "noise.py", "unet.py"} <= {path.name for path in ENGINE}
    assert siblings(ROOT / "ddpm_fast" / "ops.py") >= {"reference"}
    assert cycles({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.stem)
def test_imports_run_downwards(path):
    for name in siblings(path):
        if path.stem in LEVEL and name in LEVEL:
            assert LEVEL[name] <= LEVEL[path.stem], f"{path.stem} imports {name}, which lies above it"


def test_no_two_modules_import_each_other():
    assert cycles({path.stem: siblings(path) for path in ENGINE}) == []


@pytest.mark.parametrize(("module", "allowed"), [("config", set()), ("noise", set()), ("schedule", {"config"})])
def test_foundations_import_no_more_than_they_need(module, allowed):
    assert siblings(ROOT / "ddpm_fast" / f"{module}.py") <= allowed


@pytest.mark.parametrize("module", ["samplers", "reference"])
def test_mathematics_rests_on_noise_schedule_and_config_alone(module):
    found = siblings(ROOT / "ddpm_fast" / f"{module}.py")
    assert found <= {"config", "noise", "schedule", "samplers"} - ({"samplers"} if module == "samplers" else set())


def test_only_ops_chooses_between_kernels_and_reference():
    assert [path.stem for path in ENGINE if "kernels" in siblings(path) and path.stem != "ops"] == []
    assert "reference" not in siblings(ROOT / "ddpm_fast" / "blocks.py") | siblings(ROOT / "ddpm_fast" / "unet.py")


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
def test_kernels_import_torch_triton_and_each_other_only(path):
    for name in imported(path):
        standard = name.split(".")[0] in sys.stdlib_module_names
        assert standard or name.startswith(("torch", "triton", "ddpm_fast.kernels")), name


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_no_bare_kernels_are_imported(path):
    assert len(path.read_text().splitlines()) <= 300
    assert "kernels" not in {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("module", ["ddpm_fast", "ddpm_fast.config"])
def test_importing_the_package_or_its_configuration_needs_no_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'triton', 'numpy'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
