import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


def python(*arguments, cwd, **environment):
    """Runs this interpreter and returns what it printed."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel built from a copy of the checkout."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("minidit", "kernels", "weights"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=tree)
    (path,) = out.glob("*.whl")
    return ZipFile(path).namelist()


@pytest.mark.parametrize("name", ["kernels", "weights"])
def test_the_folders_are_packages_only_inside_of_minidit(name):
    link = ROOT / "minidit" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert not (ROOT / name / "__init__.py").exists()


def test_a_wheel_installs_minidit_and_nothing_beside_it(wheel):
    assert {name.split("/")[0] for name in wheel} == {"minidit", "minidit-0.1.0.dist-info"}


@pytest.mark.parametrize("name", ["minidit", "minidit/integrations", "kernels", "weights"])
def test_a_wheel_holds_every_module_once(wheel, name):
    package = name if name.startswith("minidit") else f"minidit/{name}"
    inside = [entry for entry in wheel if entry.rpartition("/")[0] == package]
    names = [path.name for path in (ROOT / name).glob("*.py")] + ["py.typed"] * (name == "minidit")
    assert sorted(inside) == sorted(f"{package}/{name}" for name in names)


def test_a_wheel_holds_the_embedded_model(wheel):
    tiny = {entry for entry in wheel if entry.startswith("minidit/weights/tiny/")}
    assert tiny == {f"minidit/weights/tiny/{name}" for name in ("config.json", "model.safetensors", "README.md")}


def test_minidit_can_be_imported_without_triton(tmp_path):
    script = "import sys; sys.modules['triton'] = None; import minidit; print(minidit.__file__)"  # None: ImportError
    assert Path(python("-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT)).strip()) == ROOT / "minidit" / "__init__.py"


def test_the_package_is_a_command(tmp_path):
    assert "usage: minidit" in python("-m", "minidit", "--help", cwd=tmp_path, PYTHONPATH=str(ROOT))
