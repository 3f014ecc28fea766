"""Hosts that take more than images, and hosts whose first layer sees no image."""

import pytest
import torch
from torch import nn

import quac_plugins as quac


class Denoiser(nn.Module):
    """As a diffusion network is called: sample, timestep, and a condition with a row for each sample."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.condition = nn.Linear(6, 8)

    def forward(self, sample, timestep, condition=None):
        rows = (
            torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1, 1).expand(len(sample), 1)
        )
        shift = self.time(rows)
        if condition is not None:
            if len(condition) != len(sample):
                raise ValueError("a condition for each sample")
            shift = shift + self.condition(condition.mean(dim=1))
        return self.last(self.act(self.first(sample) + shift[:, :, None, None]))


SAMPLE, CONDITION = torch.rand(2, 4, 8, 8), torch.rand(2, 5, 6)


@pytest.mark.parametrize(
    "example",
    [
        (SAMPLE, 10),
        (SAMPLE, torch.tensor([3.0, 4.0]), CONDITION),
        {"sample": SAMPLE, "timestep": 10, "condition": CONDITION},
        (SAMPLE[:1].byte(), torch.tensor(7)),
    ],
    ids=["tuple", "rows", "by name", "integers"],
)
@pytest.mark.parametrize("on", ["cpu", "meta"])
def test_a_host_that_takes_more_than_images(example, on, cheap):
    model = quac.inject(Denoiser().to(on), quac.QuACConfig(quality=cheap, tap="given", where="spatial"), example)
    record = quac.injection_of(model)
    assert record.tap == "first"
    assert [(site.name, site.channels) for site in record.sites] == [("act", (8,))]


def test_a_host_that_decides_by_values_is_run_for_real(cheap):
    class ByValue(Denoiser):
        def forward(self, sample, timestep, condition=None):
            return super().forward(sample if sample.sum() > 0 else -sample, timestep, condition)

    model = quac.inject(ByValue(), quac.QuACConfig(quality=cheap, tap="given"), (SAMPLE, 1.0, CONDITION))
    assert quac.injection_of(model).tap == "first"


@pytest.mark.parametrize("example", [(), {}, (1, SAMPLE), {"timestep": 1}, SAMPLE[0], "image", SAMPLE[:0]])
def test_an_example_that_begins_with_no_images(example, cheap):
    with pytest.raises(ValueError, match=r"example must be a tensor of images \(B, C, H, W\), or the host's arguments"):
        quac.inject(Denoiser(), quac.QuACConfig(quality=cheap), example)


class OfTokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 16)
        self.act = torch.nn.GELU()
        self.last = torch.nn.Linear(16, 6)

    def forward(self, tokens):
        return self.last(self.act(self.first(tokens)))


def test_a_host_of_tokens(cheap, moved):
    tokens, q = torch.rand(2, 5, 6), torch.rand(2, 6)
    config = quac.QuACConfig(quality=cheap, tap="given", norm="layer")
    model = moved(quac.inject(OfTokens().eval(), config, tokens[:1]))
    assert [(site.name, site.channels) for site in quac.injection_of(model).sites] == [("act", (16,))]
    with quac.use_q(model, q):
        both = model(tokens)
        with pytest.raises(ValueError, match=r"layer 'first' expects .*tokens \(B, N, 6\), got \(2, 5, 7\)"):
            model(torch.rand(2, 5, 7))
    with quac.use_q(model, q[1:]):
        torch.testing.assert_close(model(tokens[1:]), both[1:])
    with quac.use_q(model, q.flip(0)):
        assert not torch.allclose(model(tokens), both)
    with pytest.raises(
        ValueError, match=r"or with tokens \(B, N, C\) where q is given \(tap='given'\), got \(1, 5, 6\)"
    ):
        quac.inject(OfTokens(), quac.QuACConfig(quality=cheap), tokens[:1])
    with pytest.raises(ValueError, match="example must be a tensor of images"):
        quac.inject(OfTokens(), quac.PriorConfig(), tokens[:1])


@pytest.fixture
def denoiser(cheap, moved):
    config = quac.QuACConfig(quality=cheap, tap="given", where="all", norm="layer")
    return moved(quac.inject(Denoiser().eval(), config, (SAMPLE, 10)))


def test_what_enters_is_never_measured(denoiser, cheap, photographs):
    with pytest.raises(quac.QualityError, match=r"'first' sees no degraded images .*must be given.*use_q"):
        denoiser(SAMPLE, 10)
    q = cheap(photographs(2, 32))
    with quac.use_q(denoiser, q):
        expected = denoiser(SAMPLE, 10)
        assert torch.equal(denoiser(SAMPLE, 10), expected)
    with quac.use_q(denoiser, q.flip(0)):
        assert not torch.equal(denoiser(SAMPLE, 10), expected)
    with quac.use_q(denoiser, q), pytest.raises(ValueError, match="for each of them"):
        denoiser(SAMPLE.repeat(2, 1, 1, 1), 10)
    with pytest.raises(quac.QualityError, match="must be given"):
        denoiser(SAMPLE, 10)


def test_it_travels_with_the_adapter(denoiser, cheap, tmp_path):
    quac.save_adapter(denoiser, tmp_path)
    other = quac.inject(Denoiser().eval(), quac.QuACConfig(quality=cheap, where="all", norm="layer"), (SAMPLE, 10))
    with pytest.raises(ValueError, match="tap is 'given' in the adapter, 'image' in this host"):
        quac.load_adapter(other, tmp_path, check_host=False)


def test_an_unknown_tap():
    with pytest.raises(ValueError, match="unknown tap 'imgae'; did you mean 'image'"):
        quac.QuACConfig(tap="imgae")
