"""What is installed: one import root, no tests, the built-in model, and nothing that only works in this tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import sglang_hicache
from tests.house.source import PRODUCT_FOLDERS, ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
MODEL_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


def _package_of(folder: Path) -> str:
    path = folder.relative_to(ROOT)
    inside = path if path.parts[0] == "sglang_hicache" else Path("sglang_hicache") / path
    return ".".join(inside.parts)


def test_every_package_is_listed() -> None:
    folders = [
        Path(where) for top in PRODUCT_FOLDERS for where, _, names in os.walk(ROOT / top) if "__init__.py" in names
    ]
    assert sorted(map(_package_of, folders)) == sorted(SETUPTOOLS["packages"])


def test_every_folder_with_code_is_a_package() -> None:
    for top in PRODUCT_FOLDERS:
        for where, _, names in os.walk(ROOT / top):
            has_code = any(name.endswith(".py") for name in names)
            assert not has_code or "__init__.py" in names, f"{where} would be left out of the wheel"


def test_version_is_the_newest_in_the_changelog() -> None:
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line.startswith("## [")
    ]
    versions = [heading.split("[")[1].split("]")[0] for heading in headings]
    assert next(version for version in versions if version != "Unreleased") == sglang_hicache.__version__


def test_every_dependency_is_pinned_and_explained() -> None:
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {item.split(">")[0].split("=")[0] for item in wanted}
    pins = (ROOT / "scripts/pins.txt").read_text(encoding="utf-8").lower()
    explained = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    assert not [name for name in names if f"\n{name.lower()}==" not in pins]
    assert not [name for name in names if name not in explained]


def test_the_model_is_small() -> None:
    folder = ROOT / "sglang_hicache" / "builtin_model"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes.keys() >= MODEL_FILES | {"NOTICE"}
    assert sum(sizes.values()) < 5_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy: building leaves files beside the source."""
    folder = tmp_path_factory.mktemp("build")
    for name in PRODUCT_FOLDERS:
        shutil.copytree(
            ROOT / name, folder / "tree" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    # What a build of the whole repository would also see.
    shutil.copytree(ROOT / "tests" / "house", folder / "tree" / "tests" / "house")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    subprocess.run(command, cwd=folder / "tree", check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_one_import_root_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    code = [name for name in names if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in code} == {"sglang_hicache"}
    assert not [name for name in code if "test" in Path(name).name and name.endswith(".py")]
    assert {Path(name).name for name in code if "/builtin_model/" in name} >= MODEL_FILES | {"NOTICE"}
    shipped = {name for name in code if name.endswith(".py")}
    source = {
        f"{_package_of(path.parent).replace('.', '/')}/{path.name}"
        for top in PRODUCT_FOLDERS
        for path in (ROOT / top).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    assert shipped == source


def test_the_command_starts_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """Isolated mode (-I) ignores the source tree, which the test environment has on its path otherwise."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path = [{str(tmp_path)!r}] + [p for p in sys.path if p != {str(ROOT)!r}]; "
        "sys.argv = ['sglang-hicache', '--help']; import runpy, sglang_hicache; "
        f"assert sglang_hicache.__file__.startswith({str(tmp_path)!r}); "
        "runpy.run_module('sglang_hicache.launch_server', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--enable-hierarchical-cache" in done.stdout


@pytest.mark.long
def test_the_tests_pass_against_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """What a user installs is what was tested: the source tree is not there, only tests, the pages that they compare
    with what they find, and the unpacked wheel."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    for name in ("tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "test_origin.py").write_text(
        "import sglang_hicache\n\n\ndef test_origin():\n"
        f"    assert sglang_hicache.__file__.startswith({str(tmp_path / 'site')!r})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_origin.py"]
    folders = ["tests/unit", "tests/machines", "tests/storage", "tests/contract"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [*command, *folders], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-3000:]
