"""Priors among tokens: right for images of every size and shape, be the grid told by layers or by the image."""

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

import quac_plugins as quac
from quac_plugins.core.inject.surgery import take_prior
from quac_plugins.core.prior.routed import Gate

NAMES = {"pvt_v2_b0": "stages", "twins_svt_small": "blocks.[01].1", "vit_tiny_patch16_224": "blocks.[01]"}
KWARGS = {  # as deep as they must be, and narrow
    "pvt_v2_b0": {"depths": (2, 1, 1, 1), "embed_dims": (8, 16, 16, 16), "num_heads": (1, 1, 2, 2)},
    "twins_svt_small": {"depths": (2, 2, 1, 1), "embed_dims": (8, 16, 16, 16), "num_heads": (1, 1, 2, 2)},
    "vit_tiny_patch16_224": {"dynamic_img_size": True, "depth": 2, "reg_tokens": 3, "embed_dim": 48},
}
WIDE, TALL = (96, 160), (160, 96)  # as many tokens


def hosted(name, size, **options):
    """A host with a prior that was put in for images of one size, and is not as it was made."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **KWARGS.get(name, {})).eval()
    options = {"site": NAMES.get(name, "stages"), **options}
    quac.inject(model, quac.PriorConfig(**options), example=torch.empty(1, 3, *size))
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in quac.adapter_state(model).values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand(tensor.shape))
        for gate in (module for module in model.modules() if isinstance(module, Gate)):
            gate.fc2.bias[1] = 9.0  # an expert, not the identity
    return model


def test_the_sites_are_tokens():
    for name in NAMES:
        assert quac.injection_of(hosted(name, WIDE)).prior.sites[0].layout == "tokens"


@pytest.mark.parametrize("size", [WIDE, TALL, (128, 64)])
@pytest.mark.parametrize("options", [{}, {"experts": ["fog", "contrast"]}])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_another_size_gets_what_it_would_have_got(name, options, size, photographs):
    images = photographs(2, 160)[:, :, : size[0], : size[1]]
    with torch.no_grad():
        expected = hosted(name, size, **options)(images)
        found = hosted(name, WIDE, **options)(images)
        assert torch.equal(found, expected)
        quac.remove(host := hosted(name, WIDE, **options))
        assert not torch.equal(found, host(images))


@pytest.mark.parametrize("name", ["pvt_v2_b0", "vit_tiny_patch16_224"])
def test_copies_and_graphs_know_it_too(name, photographs):
    images = photographs(2, 160)[:, :, : TALL[0], : TALL[1]]
    model = hosted(name, WIDE)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(copy.deepcopy(model)(images), expected)
        assert torch.equal(torch.load(buffer, weights_only=False)(images), expected)
        exported = torch.export.export(model, (images,), strict=False).module()
        torch.testing.assert_close(exported(images), expected)
        traced = torch.jit.trace(model, images, check_trace=False)
        torch.testing.assert_close(traced(images), expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected)


def test_a_fit_on_images_of_another_size():
    model = hosted("pvt_v2_b0", (224, 224))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "quac_prior" not in name}
    pictures = (torch.rand(3, 128, 128, 3) * 255).byte().numpy()
    options = {"steps": 4, "views": 1, "draws": 2, "input_size": 128, "progress": False}
    report = quac.fit_prior(model, pictures, corruptions=["contrast"], **options)
    assert report.images["all"] == 3
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


VIT = "vit_tiny_patch16_224"


def test_every_way_through_the_host_knows_it(photographs):
    images = photographs(1, 160)[:, :, : TALL[0], : TALL[1]]
    model = hosted(VIT, WIDE)
    with torch.no_grad():
        features = hosted(VIT, TALL).forward_features(images)
        assert torch.equal(model.forward_features(images), features)
        assert torch.equal(model.forward_intermediates(images)[0], features)
        put_back = take_prior(model)
        assert not any("quac" in name for name, _ in model.named_modules())
        assert not torch.equal(model.forward_features(images), features)
        put_back()
        assert torch.equal(model.forward_features(images), features)


def test_each_thread_has_its_own_images(photographs):
    pictures = [photographs(1, 160)[:, :, : size[0], : size[1]] for size in (WIDE, TALL)]
    model = hosted(VIT, WIDE)
    with torch.no_grad():
        expected = [hosted(VIT, picture.shape[2:])(picture) for picture in pictures]
        met = threading.Barrier(2)
        model.blocks[0].register_forward_pre_hook(lambda *_: (met.wait(), None)[1])
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(model, pictures))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_is_recomputed_is_of_its_own_image_or_an_error():
    model = hosted(VIT, WIDE)
    model.set_grad_checkpointing()
    wide, tall, small = (torch.rand(1, 3, *size) for size in (WIDE, TALL, (64, 64)))
    first, _ = model(wide).sum(), model(small)
    first.backward()  # the other image has another number of tokens
    first, _ = model(wide).sum(), model(tall)
    with pytest.raises(ValueError, match="6×10 and 10×6"):
        first.backward()


def test_trained_on_images_of_one_shape_after_the_other():
    model = hosted(VIT, WIDE).train()
    model.set_grad_checkpointing()
    for size in (WIDE, TALL, WIDE):
        model(torch.rand(1, 3, *size)).sum().backward()


def test_tokens_that_are_no_grid_of_the_image_are_refused():
    vit = hosted(VIT, (64, 64))
    vit.blocks[0].register_forward_pre_hook(lambda block, args: (args[0][:, :-1], *args[1:]))
    with pytest.raises(ValueError, match="no grid of stride 16 over the image"):
        vit(torch.rand(1, 3, 128, 128))


def test_a_pair_of_numbers_that_is_not_the_grid_is_not_taken_for_it():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x, window):
            return self.fc(x)

    class Host(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 4, 4)
            self.block = Block()

        def forward(self, x):
            return self.block(self.stem(x).flatten(2).transpose(1, 2), (7, 7))

    host = Host().eval().requires_grad_(False)  # as under a prior: a Linear rounds otherwise where x has a gradient
    images = torch.rand(2, 3, 64, 96)
    expected = host(images)
    quac.inject(host, quac.PriorConfig(site="block"), example=torch.empty(1, 3, 64, 96))
    assert quac.injection_of(host).prior.sites[0].grid == (16, 24)
    assert torch.equal(host(images), expected)
