"""Every Python block of the README and of the site's pages runs, in a fresh process; tables and links are true."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


def test_python_blocks_of_the_readme_and_the_pages_run(tmp_path):
    """In one process, a page in names of its own: its blocks may need one another and nothing else."""
    pages = {str(page.relative_to(ROOT)): blocks_of(page) for page in PAGES}
    assert len(pages["README.md"]) == 4
    (tmp_path / "blocks.json").write_text(json.dumps(pages), encoding="utf-8")
    run = """
        import json, torch
        torch.set_num_threads(1)
        for page, blocks in json.load(open("blocks.json")).items():
            names = {"__name__": page}
            for block in blocks:
                exec(compile(block, page, "exec"), names)
    """
    (tmp_path / "run.py").write_text(textwrap.dedent(run), encoding="utf-8")
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "my-adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_config_for_mmengine_runs_as_written(tmp_path):
    """In a fresh process: mmpretrain's language models fail beside transformers 5, its backbones do not."""
    config = blocks_of(ROOT / "docs/frameworks/mmengine.md")[0]
    assert "QuACResNet" in config
    (tmp_path / "config.py").write_text(config, encoding="utf-8")
    run = """
        from mmengine.config import Config
        from mmengine.runner import Runner
        cfg = Config.fromfile("config.py")
        cfg.default_scope, cfg.work_dir, cfg.log_level = "mmpretrain", "work", "ERROR"
        runner = Runner.from_cfg(cfg)
        from mmengine.registry import MODELS
        from quac_plugins import ChannelActivation
        bare = MODELS.build(dict(type="QuACResNet", depth=18))
        for model in (runner.model, bare):
            assert sum(isinstance(module, ChannelActivation) for module in model.modules()) > 2
        assert "FitPriorHook" in [type(hook).__name__ for hook in runner.hooks]
    """
    code = "import torch\ntorch.set_num_threads(1)\n" + textwrap.dedent(run)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_files_that_the_readme_and_the_pages_name_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_tables_of_the_readme_are_those_of_the_results_and_every_marker_has_its_table():
    tables = runpy.run_path(str(ROOT / "docs/tables.py"))
    text = README.read_text(encoding="utf-8")
    assert tables["fill"](text) == text, "run: python docs/tables.py"
    assert text.count("\n") <= 150
    for page in PAGES:
        for name in re.findall(r"<!-- table: (\S+) -->", page.read_text(encoding="utf-8")):
            assert tables["table"](name).count("\n") > 2
