"""Names are no identities: modules that have several, that are wrapped, and that are no longer there."""

import copy
import io

import pytest
import torch
from torch import nn

import quac_plugins as quac
from quac_plugins.core.inject.fingerprint import fingerprint

QUAC = quac.QuACConfig(where="all", norm="layer", mean=(0.5,), std=(0.5,))
PRIOR = quac.PriorConfig(site=["backbone.0", "backbone.4"], mean=(0.5,), std=(0.5,))


class Net(nn.Module):
    """A backbone whose parts hang a second time in a Sequential; either of them can be the one that runs."""

    def __init__(self, second=False):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.PReLU(8), nn.Conv2d(8, 12, 3, stride=2)
        )
        self.again = nn.Sequential(*self.backbone) if second else None
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head((self.backbone if self.again is None else self.again)(x).mean((2, 3)))


def filled(net, cheap):
    for config in (copy.copy(QUAC), copy.copy(PRIOR)):
        config.quality = cheap
        quac.inject(net, config, torch.rand(1, 3, 32, 32))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in quac.adapter_state(net).values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.3)
    return net.eval()


def test_the_text_of_a_record_is_a_summary(cheap):
    host = Net()
    before = sum(p.numel() for p in host.parameters())
    net = filled(host, cheap)
    text, added = str(quac.injection_of(net)), sum(p.numel() for p in net.parameters()) - before
    assert f"parameters: {added:,} || host: {before:,} || {100 * added / before:.3g} %" in text
    assert "qacon (init=preserve, norm=layer) at 2 places: backbone.1, backbone.3\n" in text
    assert "prior light at 2 places: backbone.0, backbone.4\n" in text
    assert "q: channel_statistics" in text
    assert len(text) < 600


def empty(net):
    return not any(mark in name for name in [*net.state_dict(), *dict(net.named_modules())] for mark in ("quac", "fc3"))


@pytest.fixture
def images(photographs):
    return photographs(2, 32) * 2 - 1


WRAPS = {
    "plain": lambda part: part,
    "torch.compile": lambda part: torch.compile(part, backend="eager"),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_part_of_several_names_or_in_a_wrapper_is_the_same_part(wrap, second, cheap, images, tmp_path):
    name = "again" if second else "backbone"
    plain = Net(second).eval()
    before, untouched = fingerprint(plain), plain(images)
    net = filled(plain, cheap)
    expected, state = net(images), quac.adapter_state(net)
    setattr(net, name, WRAPS[wrap](getattr(net, name)))
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(net), buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False) if wrap == "plain" else copy.deepcopy(net)
    for same in (net, loaded):
        assert fingerprint(same) == before
        assert quac.adapter_state(same).keys() == state.keys()
        torch.testing.assert_close(same(images), expected)
    quac.save_adapter(loaded, tmp_path)
    for wrapped in (False, True):  # into the same network as it is built, and as it runs
        fresh = filled(Net(second), cheap)
        for tensor in quac.adapter_state(fresh).values():
            tensor.zero_()
        if wrapped:
            setattr(fresh, name, WRAPS[wrap](getattr(fresh, name)))
        torch.testing.assert_close(quac.load_adapter(fresh, tmp_path)(images), expected)
    quac.remove(net)
    assert empty(net)
    torch.testing.assert_close(net(images), untouched)
    assert all(p.requires_grad for p in net.parameters())


def test_the_tap_sits_on_the_layer_that_runs_and_has_its_first_name(cheap, images):
    net = filled(Net(second=True), cheap)
    assert quac.injection_of(net).tap == "backbone.0"
    assert not any("quac" in name for name in net.again._modules)


def test_what_is_put_into_a_wrapped_part_goes_by_the_names_without_the_wrapper(cheap, images, tmp_path):
    net = Net().eval()
    net.backbone = torch.compile(net.backbone, backend="eager")
    host = net(images)
    filled(net, cheap)
    assert {site.name for site in quac.injection_of(net).sites} == {"backbone.1", "backbone.3"}
    assert quac.adapter_state(net).keys() == quac.adapter_state(filled(Net(), cheap)).keys()
    assert not torch.allclose(net(images), host)
    torch.testing.assert_close(quac.remove(net)(images), host)


def test_all_of_a_wrapped_part_is_fitted(photos, quick):
    net = Net()
    net.backbone = torch.compile(net.backbone, backend="eager")
    options = {**quick, "corruptions": "contrast", "input_size": 32, "least_positions": 1}
    report = quac.fit_prior(net, photos, config=PRIOR, mean=0.5, std=0.5, deep=None, **options)
    fitted = {name for name, tensor in quac.adapter_state(net).items() if tensor.abs().sum() > 0}
    learned = [t for name, t in quac.adapter_state(net).items() if not name.endswith((".mean", ".std"))]
    assert report.parameters == sum(t.numel() for t in learned)
    assert {name.split(".quac_prior.")[0] for name in fitted} == {"backbone.0", "backbone.4"}


@pytest.mark.parametrize("gone", ["backbone.3", "backbone.4", "backbone.0", "backbone"])
def test_a_part_that_was_replaced_is_told_and_the_rest_can_be_removed(gone, cheap, tmp_path, photos, quick):
    net = filled(Net(), cheap)
    net.set_submodule(gone, nn.Identity())
    for use in (
        lambda: quac.save_adapter(net, tmp_path / "adapter"),
        lambda: quac.adapter_state(net),
        lambda: quac.fit_prior(net, photos, **quick),
        lambda: quac.fit_qacon(net, photos, **quick),
    ):
        with pytest.raises(ValueError, match=rf"put in at '{gone}.* not in the model.*quac_plugins\.remove\(model\)"):
            use()
    assert not (tmp_path / "adapter").exists()
    quac.remove(net)
    assert empty(net)
    assert quac.injection_of(net) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_a_part_that_another_tool_wraps_otherwise_is_told(cheap):
    net = filled(Net(), cheap)
    net.backbone[1] = nn.Sequential(net.backbone[1])
    with pytest.raises(ValueError, match=r"put in at 'backbone\.1' is now at 'backbone\.1\.0'"):
        quac.adapter_state(net)
    assert empty(quac.remove(net))
