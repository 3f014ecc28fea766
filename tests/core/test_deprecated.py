"""Every old name warns and does what the new one does."""

import numpy as np
import pytest
import timm
import torch

import quac_plugins as quac
from quac_plugins.commands.console import new_option
from quac_plugins.core.deprecated import moved, renamed
from quac_plugins.core.kernels.native import kernels_choice
from quac_plugins.degradations import Corrupt
from quac_plugins.fit import Data
from quac_plugins.fit.draws import make_draws
from quac_plugins.fit.sources import few_images

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet_qacon", init="paper").eval()


def _given(model, context):
    with getattr(quac, context)(model, torch.zeros(2, 36)), torch.no_grad():
        return model(IMAGES)


def _restored(model, **which):
    with torch.no_grad():
        return quac.restore_then(model, lambda images: images.mean(1, keepdim=True).expand_as(images), **which)(IMAGES)


def _class(model, **which):
    return quac.RestoreThen(model, lambda images: images, **which).adapt_to


def _data(model, **which):
    return Data(images="few/", **which).levels


def _unet(model, **which):
    from quac_plugins.diffusers import QuACUNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    network = QuACUNet2DModel(**blocks, layers_per_block=1, norm_num_groups=4, sample_size=16, quac={"where": "all"})
    with torch.no_grad():
        return network.eval()(IMAGES[:, :, :16, :16], 5, **which).sample


def _corrupted(model, **which):
    from quac_plugins.detectron2.degradations import CorruptImage

    image = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8)
    return torch.from_numpy(CorruptImage("contrast", 3, seed=0, **which).get_transform(image).apply_image(image))


def _drawn(model, **which):
    return repr(Corrupt("contrast", **which))


def _draws(model, **which):
    photographs = few_images(np.full((1, 64, 64, 3), 128, dtype=np.uint8))
    return torch.from_numpy(make_draws(photographs, (32, 32), corruptions="contrast", severities=3, **which).degraded)


def _fit(model, **which):
    with pytest.raises(ValueError, match="clean_share is for one FDM") as error:
        quac.fit_prior(model, **which)
    return str(error.value)


def _option(model, **which):
    return new_option("--severity", which.get("severity"), "--severities", which.get("severities"))


def _choice(model, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUAC_KERNELS", value)
        return kernels_choice()


Q = torch.linspace(0, 1, 72).reshape(2, 36)
FEW = Data(images="few/", corruptions="fog,snow", clean_share=0.1)
OLD = {  # what is called, with the old name, with the new one
    "quality_of": (_given, {"context": "quality_of"}, {"context": "use_q"}),
    "restore_then": (_restored, {"quality": "degraded"}, {"adapt_to": "degraded"}),
    "RestoreThen": (_class, {"quality": "degraded"}, {"adapt_to": "degraded"}),
    "QUAC_KERNELS=reference": (_choice, {"value": "reference"}, {"value": "plain"}),
    "QUAC_KERNELS=fused": (_choice, {"value": "fused"}, {"value": "native"}),
    "Data": (_data, {"severity": (1, 5)}, {"severities": (1, 5)}),
    "Corrupt": (_drawn, {"severity": [1, 3]}, {"severities": [1, 3]}),
    "--severity": (_option, {"severity": "1,3"}, {"severities": "1,3"}),
    "fit_prior": (_fit, {"images": FEW}, {"data": FEW}),
    "make_draws": (_draws, {"workers": 0}, {"num_workers": 0}),
    "QuACUNet2DModel": (_unet, {"quality": Q}, {"q": Q}),
    "CorruptImage": (_corrupted, {"image_format": "RGB"}, {"channel_order": "rgb"}),
}


@pytest.mark.parametrize(("call", "old", "new"), OLD.values(), ids=OLD)
def test_an_old_name_warns_and_does_the_same(call, old, new, model, recwarn):
    expected = call(model, **new)
    assert not [warning for warning in recwarn if "deprecated and will be gone" in str(warning.message)]
    with pytest.warns(DeprecationWarning, match="deprecated and will be gone in the next version: use"):
        result = call(model, **old)
    assert torch.equal(result, expected) if isinstance(expected, torch.Tensor) else result == expected


@pytest.mark.parametrize("case", ["RestoreThen", "Data", "CorruptImage"])
def test_an_old_attribute_warns_and_is_the_new_one(case, model):
    if case == "RestoreThen":
        holder, old, new = quac.RestoreThen(model, lambda images: images, adapt_to="degraded"), "quality", "adapt_to"
    elif case == "Data":
        holder, old, new = Data(images="few/", severities=(1, 5)), "severity", "severities"
    else:
        from quac_plugins.detectron2.degradations import CorruptImage

        holder, old, new = CorruptImage("contrast", channel_order="rgb"), "image_format", "channel_order"
    with pytest.warns(DeprecationWarning, match=rf"{case}\.{old} is deprecated .* use \.{new}"):
        assert getattr(holder, old) == getattr(holder, new)


def test_a_model_that_the_earlier_version_pickled_whole_goes_on(model):
    expected = quac.RestoreThen(model, torch.nn.AvgPool2d(3, 1, 1), adapt_to="degraded")
    earlier = {"quality" if name == "adapt_to" else name: value for name, value in expected.__dict__.items()}
    read = quac.RestoreThen.__new__(quac.RestoreThen)
    read.__setstate__(earlier)
    with torch.no_grad():
        assert torch.equal(read(IMAGES), expected(IMAGES))
    assert read.adapt_to == "degraded"


def test_both_names_of_an_argument_are_refused():
    with pytest.raises(TypeError, match=r"paint got colour= and color=, the old and the new name of one argument"):
        renamed(colour="color")(_paint)(color="red", colour="red")


def _paint(color):
    return color


_paint.__qualname__ = "paint"


def test_other_names_of_a_module_are_looked_up_as_before():
    lookup = moved("here", len, old="math:pi")
    assert lookup("four") == 4
    with pytest.raises(AttributeError, match="module 'here' has no attribute 'new'"):
        moved("here", old="math:pi")("new")
