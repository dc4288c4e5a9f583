"""pyproject.toml: the project as a tool, `gumbel-cl-lora`, from its checkout and from a wheel."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import main
from tests.helpers import ROOT, SMALL


def test_what_is_installed_is_what_there_is() -> None:
    project = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML").loads((ROOT / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["gumbel-cl-lora"].partition(":")
    assert getattr(importlib.import_module(module), function) is main.main
    assert {"trackers", "search", "slurm", "export", "report", "dev"} <= project["project"]["optional-dependencies"].keys()
    setup = project["tool"]["setuptools"]
    assert project["project"]["dynamic"] == ["dependencies"]  # in one place, the file that the README installs
    assert setup["dynamic"]["dependencies"] == {"file": ["requirements.txt"]} and (ROOT / "requirements.txt").exists()
    assert {f"{name}.py" for name in setup["py-modules"]} == {path.name for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {f"{name}*" for name in packages} == set(setup["packages"]["find"]["include"])
    modules = [path for name in packages for path in (ROOT / name).rglob("*.py")]
    assert [path for path in modules if not (path.parent / "__init__.py").exists()] == [], "a package that would be left out"
    data = {path for name in packages for path in (ROOT / name).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}
    taken = {path for package, patterns in setup["package-data"].items() for pattern in patterns
             for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    assert data - set(modules) == taken


@pytest.mark.slow
@pytest.mark.parametrize("editable", [True, False], ids=["editable", "wheel"])
def test_the_installed_command_is_main(editable: bool, tmp_path: Path) -> None:
    """In an environment that finds the packages of this one, and from a copy: a build leaves files beside its sources."""
    pytest.importorskip("setuptools", minversion="77")
    copy, venv = tmp_path / "copy", tmp_path / "venv"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".toml", ".txt", ".md"):
            shutil.copy(path, copy)
        elif (path / "__init__.py").exists():
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    found = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, text=True,
                           capture_output=True).stdout.strip()
    Path(found, "here.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *(["-e"] if editable else []),
                    str(copy)], check=True, capture_output=True)

    def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
        return subprocess.run([venv / "bin" / "gumbel-cl-lora", *arguments], cwd=folder, text=True, capture_output=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""})

    (tmp_path / "mine.json").write_text(json.dumps({**SMALL, "filepath": "out"}))
    shown = command("--config=mine.json", "--dry-run", folder=tmp_path)  # reads the embedded backbone's weights
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["config"]["filepath"] == "out"
    refused = command("--config=exps/no_such.json", folder=ROOT)
    assert refused.returncode == 2 and "there is no such file" in refused.stderr and "Traceback" not in refused.stderr
