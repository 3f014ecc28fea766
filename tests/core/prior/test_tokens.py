"""Priors among the tokens of hosts whose layers know the grid: right for images of every size and shape."""

import copy
import io

import pytest
import timm
import torch

import quac_plugins as quac
from quac_plugins.core.prior.routed import Gate

NAMES = {"pvt_v2_b0": "stages", "twins_svt_small": "blocks.[01].1"}  # a norm at the end is not told the grid
WIDE, TALL = (96, 160), (160, 96)  # as many tokens


def hosted(name, size, **options):
    """A host with a prior that was put in for images of one size, and is not as it was made."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
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


def test_copies_and_graphs_know_it_too(photographs):
    images = photographs(2, 160)[:, :, : TALL[0], : TALL[1]]
    model = hosted("pvt_v2_b0", WIDE)
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


def test_a_host_that_does_not_tell_its_grid_takes_one_size():
    vit = hosted("vit_tiny_patch16_224", (224, 224))
    vit.pos_embed = torch.nn.Parameter(torch.zeros(1, 65, vit.embed_dim))
    vit.patch_embed.strict_img_size = False
    with pytest.raises(ValueError, match=r"tokens and \d+ in front, got"):
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
