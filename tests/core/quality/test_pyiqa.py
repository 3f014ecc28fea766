"""pyiqa's metrics as quality functions; where pyiqa is not installed, that this is said."""

import copy
import importlib.util
import pickle
import sys

import pytest
import torch
from skimage import data

from quac_plugins.core.quality.pyiqa import PyIQA
from quac_plugins.core.quality.registry import resolve_quality

INSTALLED = importlib.util.find_spec("pyiqa") is not None


@pytest.fixture
def missing(monkeypatch):
    for name in [name for name in sys.modules if name == "pyiqa" or name.startswith("pyiqa.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyiqa", None)


@pytest.mark.parametrize("spec", ["pyiqa:musiq", "pyiqa", "pyiqa:nonsense"])
def test_missing_package_is_named(missing, spec):
    with pytest.raises(ImportError, match=r'pip install "quac-plugins\[pyiqa\]"'):
        resolve_quality(spec)


if INSTALLED:

    @pytest.fixture(scope="module")
    def images():
        crops = [torch.tensor(getattr(data, name)()[100:180, 100:196]) for name in ("astronaut", "coffee", "chelsea")]
        return torch.stack(crops).permute(0, 3, 1, 2).float() / 255

    @pytest.mark.parametrize("name", ["entropy", "piqe"])
    def test_a_metric_equals_pyiqa(images, name):
        import pyiqa

        found = resolve_quality(f"pyiqa:{name}")
        assert (found.name, found.channels) == (f"pyiqa:{name}", 1)
        q = found(images)
        assert q.shape == (3, 1)
        assert q.dtype == torch.float32
        metric = pyiqa.create_metric(name, device=torch.device("cpu"))
        for i in range(3):
            torch.testing.assert_close(q[i], metric(images[i : i + 1]).reshape(1).float())
            assert torch.equal(found(images[i : i + 1])[0], q[i])  # whatever else is in the batch

    def test_finite(images):
        found = resolve_quality("pyiqa:piqe")
        broken = images.clone()
        broken[0] = 0.5
        broken[1, :, 3] = float("nan")
        broken[2] = float("inf")
        assert found(broken).isfinite().all()
        function = PyIQA("a stand-in")
        function._metrics[torch.device("cpu")] = lambda image: torch.tensor([float("nan")])
        assert function(images).tolist() == [[0.0]] * 3

    def test_shapes_without_data():
        assert PyIQA("musiq")(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 1)

    def test_copies_share_and_pickles_are_small(images):
        found = resolve_quality("pyiqa:entropy")
        q = found(images)
        assert copy.deepcopy(found.function) is found.function
        dump = pickle.dumps(found)
        assert len(dump) < 1000
        assert torch.equal(pickle.loads(dump)(images), q)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("pyiqa", r"needs the name of a metric.*pyiqa:musiq.*niqe"),
            ("pyiqa:musik", r"no metric 'musik'.*did you mean 'musiq'"),
            ("pyiqa:lpips", r"'lpips' compares with a reference.*No-reference metrics:.*musiq"),
            ("pyiqa:fid", r"'fid' needs more than an image"),
        ],
    )
    def test_wrong_names(spec, message):
        with pytest.raises(ValueError, match=message):
            resolve_quality(spec)

    def test_weights_that_cannot_be_had(images, monkeypatch):
        import pyiqa

        def create_metric(*args, **kwargs):
            raise OSError("no route to host")

        monkeypatch.setattr(pyiqa, "create_metric", create_metric)
        with pytest.raises(RuntimeError, match=r"'niqe'.*no route to host.*IQA-PyTorch-Weights.*hub.*brisque"):
            resolve_quality("pyiqa:niqe")(images)

    def test_wrong_images():
        found = resolve_quality("pyiqa:entropy")
        with pytest.raises(TypeError, match="uint8"):
            found(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
            found(torch.zeros(3, 8, 8))
