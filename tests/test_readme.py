"""Every Python block of the README runs, in order, in a fresh process."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_of_the_readme_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 4
    script = tmp_path / "readme.py"
    script.write_text("import torch\ntorch.set_num_threads(1)\n" + "\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "my-adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_config_for_mmengine_runs_as_written(tmp_path):
    """In a fresh process: mmpretrain's language models fail beside transformers 5, its backbones do not."""
    section = README.read_text(encoding="utf-8").partition("## MMEngine")[2]
    config = section.partition("```python\n")[2].partition("```")[0]
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


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target
