"""What `make` installs: every line pinned and hashed, every dependency there, and one version of each in all files."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FILES = ("run", "test", "torch-pypi", "torch-cpu")
OPTIONS = ("--extra-index-url https://download.pytorch.org/whl/cpu",)
"""What may stand beside packages."""
SHA256 = re.compile(r"--hash=sha256:[0-9a-f]{64}")
EXTRAS = ("hub", "onnx", "test")
"""What test.txt installs beside the package's own dependencies; bench's own are installed by hand."""


def lines(name: str) -> list[str]:
    """Return what a file asks for, one package a line, without comments."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ")
    found = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [line for line in found if line not in OPTIONS]


def pinned(name: str) -> dict[str, str]:
    """Return the version of each package of a file; a local one (+cpu) counts as its public one."""
    found = dict[str, str]()
    for line in lines(name):
        requirement = Requirement(line.split("--hash", 1)[0])
        (only,) = requirement.specifier
        package = canonicalize_name(requirement.name)
        assert package not in found, f"{package} stands in {name}.txt twice"
        found[package] = only.version.partition("+")[0]
    return found


def asked(*extras: str) -> list[Requirement]:
    """Return what pyproject.toml asks for: the package's own dependencies, and those of extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_extras = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in [*project["dependencies"], *of_extras]]


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_one_version_with_its_hashes(name):
    assert lines(name)
    for line in lines(name):
        requirement, *hashes = line.split("--hash")
        pins = Requirement(requirement).specifier
        assert [pin.operator for pin in pins] == ["=="], line
        assert not any(pin.version.endswith("*") for pin in pins), line
        assert hashes, line
        assert len(SHA256.findall(line)) == len(hashes), line


@pytest.mark.parametrize(("name", "extras"), [("run", ()), ("test", EXTRAS)])
@pytest.mark.parametrize("torch", ["torch-pypi", "torch-cpu"])
def test_every_dependency_is_there_in_a_version_that_will_do(name, extras, torch):
    versions = pinned(torch) | pinned("run") | pinned(name)
    for requirement in asked(*extras):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is in none of {torch}.txt, run.txt and {name}.txt"
        assert requirement.specifier.contains(version), requirement


def test_all_files_agree_on_versions():
    versions = dict[str, tuple[str, str]]()
    for name in FILES:
        for package, version in pinned(name).items():
            where, before = versions.setdefault(package, (name, version))
            assert version == before, f"{package} is {before} in {where}.txt and {version} in {name}.txt"


def test_make_installs_from_these_files_and_without_hashes_only_the_package_itself():
    text = (ROOT / "Makefile").read_text()
    assert "--require-hashes --no-deps --only-binary :all: --requirement" in text
    of_make_test = text.partition(".venv-oldest/installed:")[0]  # which is for the oldest versions, and is not locked
    assert of_make_test.count("$(LOCKED)") == 3
    assert len(re.findall(r"\$\(PIP\)", of_make_test)) == 2  # LOCKED and THIS
    for name in FILES:
        assert (ROOT / "requirements" / f"{name}.txt").exists()
    assert re.search(r"^THIS := .*--no-deps --no-build-isolation --editable \.$", text, re.MULTILINE)
