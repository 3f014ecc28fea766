"""Names that torch may take away: without each, all is computed the plain way."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from quac_plugins.core import private
from quac_plugins.core.kernels import activate, native, plain

SOURCE = Path(private.__file__).read_text()
PATHS = {
    (path, module)
    for path, module in re.findall(r'find\("([\w.]+)"(?:, ([\w."]+))?\)', SOURCE)
    if "renamed" not in path
}


@pytest.fixture
def again(monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "native")
    yield
    importlib.reload(private)


@pytest.mark.usefixtures("again")
@pytest.mark.parametrize(("path", "module"), sorted(PATHS))
def test_without_it_all_is_computed_the_plain_way(path, module, monkeypatch):
    x, theta, find = torch.randn(2, 3, 4), [torch.rand(3, 1)], private.find
    assert native.may_read(x)
    owner = importlib.import_module(eval(module, vars(private)) if module else "torch")
    *where, name = path.split(".")
    for part in where:
        owner = getattr(owner, part)
    with monkeypatch.context() as patch:
        if owner is torch.Tensor:  # inherited of a class that is written in C
            patch.setattr(torch, "Tensor", object)
        else:
            patch.delattr(owner, name)
        importlib.reload(private)
        assert find(path, eval(module, vars(private)) if module else "torch") is None
        importlib.import_module("quac_plugins")
    assert private.has_numbers(x)
    assert not private.in_backward()
    torch.testing.assert_close(activate(x, theta, plain.swish), plain.swish(x, *theta))
    if not module and path != "_C._current_graph_task_id":
        assert not native.may_read(x)


def test_they_are_named_in_one_file():
    named = re.compile(r"torch\._\w|_is_zerotensor|_current_level")
    files = Path(private.__file__).parents[1].rglob("*.py")
    assert [p.name for p in files if named.search(p.read_text())] == ["private.py"]
