"""Feature de-drifting modules: the identity at first, standardized per channel, right in every layout."""

import copy
import io

import pytest
import torch
from torch import nn

from quac_plugins.core.prior.fdm import FDM, FDMS, act_names, make_act, needs_quality, resolve_fdm
from quac_plugins.core.prior.sites import PriorSite

LAYOUTS = ["nchw", "nhwc", "tokens"]
RESIDUAL = ["dense", "light", "ncrf"]  # the others do not add to features what a network makes of them


def site_of(layout="nchw", channels=8, stride=0, prefix=0, grid=(5, 7)):
    tokens = layout == "tokens"
    return PriorSite("layer1", channels, layout, prefix if tokens else 0, grid if tokens else None, stride)


def features(site, batch=2, size=(5, 7), dtype=torch.float32):
    pixels = torch.randn(batch, site.channels, *size)
    if site.layout == "nhwc":
        pixels = pixels.permute(0, 2, 3, 1)
    if site.layout == "tokens":
        pixels = torch.cat((torch.randn(batch, site.prefix, site.channels), pixels.flatten(2).transpose(1, 2)), 1)
    return (pixels * 3 + 1).to(dtype)


def as_image(x, site):
    """Features of any layout as (B, C, H, W), without the tokens in front."""
    if site.layout == "tokens":
        return x[:, site.prefix :].transpose(1, 2).unflatten(2, site.grid)
    return x.permute(0, 3, 1, 2) if site.layout == "nhwc" else x


def moved(module):
    """Away from its initialization, statistics included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return module.eval()


# -- the identity at first


@pytest.mark.parametrize("fdm", RESIDUAL)
@pytest.mark.parametrize("act", ["relu", "gelu", "acon", "meta_acon"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [0, 1, 2, 4])
def test_fresh_it_is_the_identity_bit_for_bit(fdm, act, layout, stride):
    site = site_of(layout, stride=stride, prefix=2)
    module = resolve_fdm(fdm)(site, act=act)
    module.mean.copy_(torch.randn(8))
    module.std.copy_(torch.rand(8) + 0.5)
    for batch in (1, 3):
        x = features(site, batch)
        assert torch.equal(module(x), x)


@pytest.mark.parametrize("fdm", RESIDUAL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_are_kept(fdm, dtype, layout):
    site = site_of(layout, stride=2)
    module, x = resolve_fdm(fdm)(site).to(dtype), features(site, dtype=dtype)
    assert torch.equal(module(x), x)
    assert moved(module)(x).dtype == dtype


@pytest.mark.parametrize("fdm", RESIDUAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_identity_and_dtype(fdm, dtype):
    site = site_of(stride=2)
    module, x = resolve_fdm(fdm)(site, act="acon"), features(site, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), x)
    moved(module)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == dtype
    expected = module(x.float()).detach()
    torch.testing.assert_close(y.float(), expected, atol=0.03 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("fdm", RESIDUAL)
def test_every_parameter_gets_a_gradient_at_once_and_the_last_one_moves_it(fdm):
    module = resolve_fdm(fdm)(site_of(stride=2), act="acon")
    x = features(module.site)
    (module(x) - x * 0.5).square().mean().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(bool(p.grad.any()) for p in module.body[-1].parameters())


def test_only_what_was_moved_is_no_longer_fresh():
    module = resolve_fdm("light")(site_of())
    assert module.is_fresh
    for change in (lambda m: m.mean.add_(1), lambda m: m.std.mul_(2), lambda m: m.body[-1].bias.data.add_(1)):
        other = copy.deepcopy(module)
        change(other)
        assert not other.is_fresh


# -- standardization


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_works_on_standardized_features_and_gives_them_back_in_the_hosts_scale(layout):
    class Scaled(nn.Module):
        def forward(self, z):
            return 0.5 * z

    site = site_of(layout, prefix=1)
    module = resolve_fdm("light")(site)
    mean, std = torch.randn(8), torch.rand(8) + 0.1
    module.mean.copy_(mean)
    module.std.copy_(std)
    module.body = Scaled()
    x = features(site)
    column = (1, -1, 1, 1)
    z = (as_image(x, site) - mean.view(column)) / std.view(column)
    torch.testing.assert_close(as_image(module(x), site), as_image(x, site) + std.view(column) * 0.5 * z)


def test_it_does_not_depend_on_the_hosts_scale():
    module = moved(resolve_fdm("light")(site_of()))
    other = copy.deepcopy(module)
    scale, shift = torch.rand(8) * 9 + 0.1, torch.randn(8)
    other.mean.copy_(module.mean * scale + shift)
    other.std.copy_(module.std * scale)
    x, column = features(module.site), (1, -1, 1, 1)
    expected = module(x) * scale.view(column) + shift.view(column)
    torch.testing.assert_close(other(x * scale.view(column) + shift.view(column)), expected, atol=1e-4, rtol=1e-4)


# -- layouts and sizes


@pytest.mark.parametrize("fdm", RESIDUAL)
@pytest.mark.parametrize("layout", ["nhwc", "tokens"])
def test_every_layout_computes_the_same(fdm, layout):
    site = site_of(layout, prefix=3)
    module = moved(resolve_fdm(fdm)(site))
    plain = resolve_fdm(fdm)(site_of())
    plain.load_state_dict(module.state_dict())
    x = features(site)
    y = module(x)
    assert y.shape == x.shape
    torch.testing.assert_close(as_image(y, site), plain(as_image(x, site).contiguous()), atol=1e-4, rtol=1e-4)
    if layout == "tokens":
        assert torch.equal(y[:, :3], x[:, :3])


@pytest.mark.parametrize("fdm", RESIDUAL)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(16, 24), (15, 23), (1, 1), (2, 9), (64, 3)])
def test_fine_features_are_folded_whatever_their_size(fdm, stride, size):
    site = site_of(stride=stride)
    module = moved(resolve_fdm(fdm)(site))
    assert (module.fold > 1) == module.folds
    x = features(site, size=size)
    y = module(x)
    assert y.shape == x.shape
    # as if the edges had been repeated by hand
    bottom, right = (-side % module.fold for side in size)
    padded = module(nn.functional.pad(x, (0, right, 0, bottom), mode="replicate"))
    torch.testing.assert_close(y, padded[:, :, : size[0], : size[1]], atol=1e-5, rtol=1e-5)
    assert not torch.equal(y, x)


@pytest.mark.parametrize("fdm", RESIDUAL)
@pytest.mark.parametrize("stride", [1, 4])
def test_memory_format_batches_and_empty_batches(fdm, stride, photographs):
    site = site_of(channels=3, stride=stride)
    module, x = moved(resolve_fdm(fdm)(site)), photographs(4, 33)
    with torch.no_grad():
        y = module(x)
        last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(module(last), y, atol=1e-5, rtol=1e-5)
        assert module(last).is_contiguous(memory_format=torch.channels_last)
        for i in range(4):
            torch.testing.assert_close(module(x[i : i + 1]), y[i : i + 1], atol=1e-5, rtol=1e-5)
        assert module(x[:0]).shape == (0, 3, 33, 33)


def test_the_input_is_not_written_to():
    module = moved(resolve_fdm("light")(site_of()))
    x = features(module.site)
    kept = x.clone()
    nn.functional.relu_(module(x))  # nor by a host that goes on in place
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("nchw", (2, 7, 5, 5), r"'layer1' expects features \(B, 8, H, W\), got \(2, 7, 5, 5\)"),
        ("nchw", (2, 8, 5), r"\(B, 8, H, W\), got \(2, 8, 5\)"),
        ("nhwc", (2, 8, 5, 5), r"\(B, H, W, 8\), got"),
        ("tokens", (2, 35, 7), r"\(B, N, 8\), got"),
        ("tokens", (2, 50, 8), r"5×7 tokens and 0 in front, got 50 tokens.*example="),
    ],
)
def test_other_features_are_refused(layout, shape, message):
    with pytest.raises(ValueError, match=message):
        resolve_fdm("light")(site_of(layout))(torch.rand(shape))


def test_width_is_the_width_inside():
    for fdm in RESIDUAL:
        widths = [m.in_channels for m in resolve_fdm(fdm)(site_of(), 24).modules() if isinstance(m, nn.Conv2d)]
        assert widths[-1] == 24


# -- copies and graphs


@pytest.mark.parametrize("fdm", RESIDUAL)
def test_copies_compute_the_same(fdm):
    module = moved(resolve_fdm(fdm)(site_of(stride=2), act="silu"))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    x = features(module.site)
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("fdm", RESIDUAL)
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
def test_in_graphs(fdm, layout):
    site = site_of(layout, stride=2, prefix=1)
    module, x = moved(resolve_fdm(fdm)(site)), features(site)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(module, (x,)).module()
    for run in (compiled, exported, torch.jit.trace(module, x)):
        torch.testing.assert_close(run(x), module(x), atol=1e-5, rtol=1e-5)


# -- the table


def test_an_fdm_of_ones_own_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr("quac_plugins.core.prior.fdm.FDMS", dict(FDMS))

    class Pointwise(FDM):
        name = "pointwise"

        def build(self, channels, width, act, quality_channels):
            return nn.Sequential(make_act(act, channels, quality_channels), nn.Conv2d(channels, channels, 1))

    module, x = resolve_fdm("pointwise")(site_of()), features(site_of())
    assert isinstance(module, Pointwise)
    assert torch.equal(module(x), x)
    with pytest.raises(ValueError, match="'light' is taken"):
        type("Other", (FDM,), {"name": "light"})


def test_names_that_nobody_knows():
    for name in ("lite", 3, None, ["light"]):
        with pytest.raises(ValueError, match=r"unknown FDM .*Known: .*light"):
            resolve_fdm(name)
    assert {"relu", "gelu", "qacon", "acon"} <= set(act_names())
    assert [needs_quality(act) for act in ("relu", "acon", "qacon", "qgelu")] == [False, False, True, True]
