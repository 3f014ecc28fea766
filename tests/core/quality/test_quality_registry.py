"""The table of quality functions: names, callables, and files found by being there."""

import sys

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quac_plugins as quac
import quac_plugins.core.quality as package
from quac_plugins.core.quality import registry
from quac_plugins.core.quality.registry import QualityFunction, quality_names, resolve_quality, shared
from quac_plugins.core.quality.tap import QualityTap


def mean_and_std(images):
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def test_names():
    names = quality_names()
    assert "brisque" in names
    assert any(name.startswith("contrique") for name in names)
    assert any(name.startswith("pyiqa") for name in names)
    assert names == quality_names()


@pytest.mark.parametrize("name", ["brisqe", "nothing of the kind", "", "brisque:argument"])
def test_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match="unknown quality function") as error:
        resolve_quality(name)
    for known in quality_names():
        assert known in str(error.value)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'brisque'"):
        resolve_quality("brisqe")


def test_a_callable_is_measured():
    found = resolve_quality(mean_and_std)
    assert (found.name, found.channels, found.builtin) == ("mean_and_std", 6, False)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(found(images), mean_and_std(images))
    assert resolve_quality(found) is found


def test_a_callable_of_given_width_is_not_called():
    def quality(images):
        raise AssertionError

    assert resolve_quality(quality, channels=5).channels == 5


def test_a_callable_object_is_named_after_its_class():
    class Sharpness(torch.nn.Module):
        def forward(self, images):
            return images.diff(dim=3).abs().mean((1, 2, 3))[:, None]

    assert resolve_quality(Sharpness()).name == "Sharpness"


@pytest.mark.parametrize(
    "quality",
    [
        lambda images: images.mean((1, 2, 3)),
        lambda images: images,
        lambda images: 3.0,
        lambda images: mean_and_std(images)[:0],
    ],
)
def test_a_callable_without_a_width_is_refused(quality):
    with pytest.raises(ValueError, match=r"expected \(1, Q\)"):
        resolve_quality(quality)


def test_activations_and_prior_with_a_family_of_one_name_share_one_tap(monkeypatch):
    class Mean:
        def __init__(self, name):
            self.name = name

        def __call__(self, images):
            return images.mean((1, 2, 3))[:, None]

    monkeypatch.setitem(registry._FAMILIES, "mean", lambda name: QualityFunction(f"mean:{name}", 1, shared(Mean, name)))
    assert resolve_quality("mean:a") == resolve_quality("mean:a") != resolve_quality("mean:b")
    for second, taps in (("mean:a", 1), ("mean:b", 2)):
        model = timm.create_model("test_resnet")
        quac.inject(model, quac.QuACConfig(quality="mean:a"))
        quac.inject(model, quac.PriorConfig(experts=["fog"], quality=second))
        assert sum(isinstance(module, QualityTap) for module in model.modules()) == taps


@pytest.mark.parametrize("spec", [None, 3, ["brisque"], torch.zeros(1)])
def test_neither_name_nor_callable(spec):
    with pytest.raises(TypeError, match=type(spec).__name__):
        resolve_quality(spec)


@pytest.mark.parametrize("shape", [(2,), (2, 5), (3, 4), (2, 4, 1)])
def test_a_wrong_shape_is_named(shape):
    found = QualityFunction("mine", 4, lambda images: torch.zeros(shape))
    with pytest.raises(ValueError, match=r"'mine'.*expected \(2, 4\)") as error:
        found(torch.rand(2, 3, 8, 8))
    assert str(shape) in str(error.value)
    assert "(2, 3, 8, 8)" in str(error.value)


def test_gradient_flows_only_if_asked():
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    assert not resolve_quality(mean_and_std)(images).requires_grad
    assert resolve_quality(mean_and_std, needs_grad=True)(images).requires_grad
    assert resolve_quality("brisque", needs_grad=True)(images).requires_grad
    with torch.no_grad():
        assert not resolve_quality(mean_and_std, needs_grad=True)(images).requires_grad


def test_a_file_is_found_by_being_there(tmp_path, monkeypatch):
    (tmp_path / "lightness.py").write_text(
        '"""Mean of each channel."""\n'
        "from quac_plugins.core.quality.registry import QualityFunction, quality_family, quality_function\n"
        '@quality_function("lightness", channels=3)\n'
        "def lightness(images):\n"
        "    return images.mean((2, 3))\n"
        '@quality_family("power")\n'
        "def power(argument):\n"
        '    return QualityFunction(f"power:{argument}", 3, lambda images: (images ** float(argument)).mean((2, 3)))\n'
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    try:
        images = torch.rand(2, 3, 8, 8)
        assert torch.equal(resolve_quality("lightness")(images), images.mean((2, 3)))
        assert torch.equal(resolve_quality("power:2")(images), (images**2).mean((2, 3)))
        assert "lightness" in quality_names()
    finally:
        sys.modules.pop("quac_plugins.core.quality.lightness", None)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 4), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_every_size_of_image_has_a_finite_feature(batch, height, width, seed):
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
    for found in (resolve_quality("brisque"), resolve_quality(lambda x: x.mean((2, 3)), channels=3)):
        q = found(images)
        assert q.shape == (batch, found.channels)
        assert q.isfinite().all()


def test_a_module_as_quality_function_only_measures(photographs):
    import timm

    import quac_plugins as quac

    own = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1))
    own.append(torch.nn.Flatten())
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    model = timm.create_model("test_resnet")
    names = set(model.state_dict())
    quac.inject(model, quac.QuACConfig(quality=own, norm="layer")).train()
    model(photographs(2, 64)).mean().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert all(p.grad is None for p in own.parameters())
    assert not any(name.startswith("quality") for name in set(model.state_dict()) - names)


def test_names_that_are_taken_are_refused():
    import quac_plugins as quac

    with pytest.raises(ValueError, match=r"'brisque' is taken by quac_plugins"):

        @quac.quality_function("brisque", channels=3)
        def mine(images):
            return images.mean((2, 3))

    with pytest.raises(ValueError, match=r"'qacon' is taken by quac_plugins"):

        class Mine(quac.QualityDriven):
            name, neutral, equation = "qacon", (1.0,), staticmethod(lambda x, a: x * a)

    with pytest.raises(TypeError, match="neutral"):

        class Unfinished(quac.QualityDriven):
            name, equation = "unfinished", staticmethod(lambda x, a: x * a)

    assert quac.ACTIVATIONS["qacon"] is quac.QACON
