"""Tiles and reflections: a network that sees only its neighbourhood computes what it would on the whole."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quac_plugins.diffusers.tiles import reflected, starts, tiled


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_reflection_goes_to_and_fro(height, width, more, further):
    x = torch.rand(1, 2, height, width)
    y = reflected(x, height + more, width + further)
    assert y.shape == (1, 2, height + more, width + further)
    assert torch.equal(y[:, :, :height, :width], x)
    if more < height and further < width:
        assert torch.equal(y, nn.functional.pad(x, (0, further, 0, more), mode="reflect"))


@given(st.integers(1, 300), st.sampled_from([16, 32, 48]), st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_tiles_reach_from_edge_to_edge_and_overlap(size, tile, overlap):
    begins = starts(size, tile, overlap)
    assert begins[0] == 0
    if size > tile:
        assert begins[-1] == size - tile
        assert all(tile - overlap >= b - a > 0 for a, b in itertools.pairwise(begins))


@pytest.mark.parametrize("size", [(1, 1), (3, 70), (64, 64), (65, 33), (100, 41), (40, 200)])
@pytest.mark.parametrize("overlap", [0, 8, 16])
def test_a_function_of_pixels_is_what_it_is(size, overlap):
    x = torch.rand(2, 3, *size)
    shapes = []

    def function(part):
        shapes.append(part.shape)
        return 3 * part[:, :2] + 1

    torch.testing.assert_close(tiled(function, x, 32, overlap, 8), 3 * x[:, :2] + 1)
    assert all(h % 8 == w % 8 == 0 and max(h, w) <= 32 for _, _, h, w in shapes)


def test_a_local_network_shows_no_seam(photographs):
    """Five 3×3 convolutions see 5 pixels far: away from the edges the tiles' result is that of the whole."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()] + [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()] * 3
    network = nn.Sequential(*layers, nn.Conv2d(8, 3, 3, padding=1)).eval()
    for x in (photographs(1, 160), torch.linspace(0, 1, 160).expand(1, 3, 160, 160)):
        with torch.no_grad():
            whole, parts = network(x), tiled(network, x, 64, 24, 8)
        # a tile's own edge, where it is padded with zeros, has nearly no weight
        assert float((whole - parts).abs().max()) < 0.02 * float(whole.std() + whole.abs().mean())


def test_what_a_tile_adds_passes_smoothly():
    """Each tile's own constant, as an activation driven by a tile's average makes it: no step between neighbours."""
    x = torch.linspace(0, 1, 200).expand(1, 3, 64, 200)
    y = tiled(lambda part: part + 0.2 * part.mean(), x, 64, 32, 8)
    steps = (y[..., 1:] - y[..., :-1]).abs()
    assert float(steps.max()) < 3 * float(steps.mean())
