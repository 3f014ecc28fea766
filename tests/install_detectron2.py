"""Put detectron2 0.6 into this environment, for the tests.

detectron2 is on no package index under its own name. A complete copy of its Python code lies inside the wheel of
LabGym, which is fetched without being installed. Its compiled operators (deformable and rotated ones) are not in it.
Users install detectron2 from its repository.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

WHEEL, INSIDE = "labgym==3.1.2", "LabGym/detectron2/"


def main() -> None:
    found = find_spec("detectron2")
    if found is not None and found.origin is not None:  # a folder of tests by this name is no detectron2
        return
    site = Path(sysconfig.get_paths()["purelib"])
    with tempfile.TemporaryDirectory(dir=site) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        subprocess.run([*pip, "--dest", temporary, WHEEL], check=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(INSIDE)]
            wheel.extractall(temporary, names)
        package = Path(temporary) / INSIDE
        for path in package.rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("LabGym.detectron2", "detectron2"), encoding="utf-8")
        shutil.move(package, site / "detectron2")
    print(f"detectron2 0.6 → {site / 'detectron2'}")


if __name__ == "__main__":
    main()
