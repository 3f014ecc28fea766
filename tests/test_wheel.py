"""The wheel, installed into an empty environment, holds the registry and the hub and lists its names."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
        text=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_file_of_registry_and_hub(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("registry", "hub"):
        files = [f for f in (ROOT / folder).rglob("*") if f.is_file()]
        assert files
        missing = [f for f in files if f"quac_plugins/_data/{f.relative_to(ROOT).as_posix()}" not in names]
        assert not missing
    assert "quac_plugins/py.typed" in names


def test_installed_wheel_lists_names_tells_its_version_and_reads_its_own_registry(wheel, tmp_path):
    # an empty environment that sees this one's libraries (torch is 6 GB), but not this checkout
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True, text=True)
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    script = f"""
import contextlib, io, runpy, sys
sys.path += {libraries!r}
import quac_plugins, timm
from importlib.metadata import version
from pathlib import Path
assert Path(quac_plugins.__file__).is_relative_to({str(environment)!r}), quac_plugins.__file__
path = Path(quac_plugins.registry_file("timm.toml"))
assert path.is_relative_to({str(environment)!r}), path
assert path.read_bytes() == Path({str(ROOT / "registry" / "timm.toml")!r}).read_bytes()
assert version("quac-plugins") == quac_plugins.__version__
said, sys.argv = io.StringIO(), ["quac_plugins", "--version"]
with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    runpy.run_module("quac_plugins", run_name="__main__")
assert said.getvalue() == f"quac {{quac_plugins.__version__}}\\n", said.getvalue()
print(len(timm.list_models("*_qacon")))
"""
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


def test_registry_names_a_missing_file_and_lists_what_there_is():
    from quac_plugins import registry_file

    with pytest.raises(FileNotFoundError, match=r"timm\.toml"):
        registry_file("detectron3/none.yaml")
    with pytest.raises(FileNotFoundError):
        registry_file("../pyproject.toml")
