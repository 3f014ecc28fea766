"""How q travels: never another image's, through threads, calls by hand, and copies."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from passes import build
from timm.utils import ModelEmaV3
from torch import nn

import quac_plugins as quac
from quac_plugins import QuACConfig, QualityError, use_q
from quac_plugins.core.quality.given import contexts_of


@pytest.fixture
def model(cheap):
    return build(cheap).eval()


class Wrapper(nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


# -- threads


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_eight_threads_are_bit_equal_to_one(name, cheap, photographs):
    model = build(cheap, name, where="all").eval()
    size = model.pretrained_cfg["input_size"][-1]
    images = [photographs(4, size)[i % 4 : i % 4 + 1] * (0.3 + 0.1 * i) for i in range(8)]
    with torch.no_grad():
        serial = [model(image) for image in images]
        assert not torch.equal(serial[0], serial[4])

        def work(i):
            torch.set_num_threads(1)
            with torch.no_grad():
                return [model(images[i]) for _ in range(6)]

        with ThreadPoolExecutor(8) as pool:
            for i, outputs in enumerate(pool.map(work, range(8))):
                assert all(torch.equal(output, serial[i]) for output in outputs)


def test_threads_that_train_have_their_own_gradients(model, photographs):
    images = photographs(4, 48)

    def gradients(i):
        torch.set_num_threads(1)
        x = images[i : i + 1].clone().requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    serial = [gradients(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for parallel, expected in zip(pool.map(gradients, range(4)), serial, strict=True):
            assert torch.equal(parallel, expected)


def test_quality_given_in_one_thread_is_not_seen_in_another(model, photographs):
    images = photographs(2, 48)
    with torch.no_grad():
        alone = model(images)
        with use_q(model, torch.full((2, 6), 7.0)):
            given = model(images)
            with ThreadPoolExecutor(1) as pool:
                other = pool.submit(torch.no_grad()(model), images).result()  # a thread starts with gradients
    assert torch.equal(other, alone)
    assert not torch.allclose(given, alone)


# -- no q


def test_an_activation_before_any_image_is_an_error_that_names_it(model):
    with pytest.raises(QualityError, match=r"layer 'act1' was called before any image.*use_q.*\(B, 6\)"):
        model.act1(torch.rand(2, model.act1.channels, 8, 8))


def test_a_part_of_a_model_with_another_batch_is_an_error_that_names_layer_and_shapes(model, photographs):
    model.conv1(photographs(2, 48))
    with pytest.raises(QualityError, match=r"'act1' got 3 rows .*2 images"):
        model.act1(torch.rand(3, model.act1.channels, 8, 8))


# -- given q


def test_given_quality_replaces_the_computed_one(model, photographs, cheap):
    images = photographs(3, 48)
    q = cheap(images)
    with use_q(model, q):
        torch.testing.assert_close(model(images), model(images))
        same = model(images)
    with use_q(model, q[:, :, None, None]):
        assert torch.equal(model(images), same)
    with use_q(model, q + 3):
        assert not torch.allclose(model(images), same)
    with use_q(Wrapper(model), q + 3):
        assert not torch.allclose(model(images), same)


def test_given_quality_nests_and_ends_also_after_an_exception(model, photographs):
    images = photographs(2, 48)
    one, two = torch.full((2, 6), 1.0), torch.full((2, 6), 2.0)

    def of(q):
        with use_q(model, q):
            return model(images)

    plain, first, second = model(images), of(one), of(two)
    assert not torch.allclose(first, second)
    with use_q(model, one):
        assert torch.equal(model(images), first)
        with use_q(model, two):
            assert torch.equal(model(images), second)
        assert torch.equal(model(images), first)
        with pytest.raises(ZeroDivisionError), use_q(model, two):
            1 / 0  # noqa: B018
        assert torch.equal(model(images), first)
    with pytest.raises(ValueError, match="boom"), use_q(model, two):
        raise ValueError("boom")
    assert torch.equal(model(images), plain)
    with use_q(model, two):
        pass
    with pytest.raises(QualityError, match="before any image"):  # and what was given is not left behind
        model.act1(torch.rand(2, model.act1.channels, 8, 8))


def test_given_quality_serves_parts_of_a_model(model, photographs):
    with use_q(model, torch.zeros(2, 6)):
        part = model.act1(torch.ones(2, model.act1.channels, 8, 8))
        assert torch.equal(part, model.act1(torch.ones(2, model.act1.channels, 8, 8), torch.zeros(2, 6)))


def test_a_copied_part_says_how_to_give_it_quality_and_takes_it(model, photographs):
    part, x = copy.deepcopy(model.layer2), torch.rand(2, 32, 12, 12)
    with pytest.raises(QualityError, match=r"copy of a part.*use_q\(model, q\).*also such a part.*\(B, 6\)"):
        part(x)
    q = torch.rand(2, 6)
    with use_q(model, q):
        expected = model.layer2(x)
    with use_q(part, q):
        assert torch.equal(part(x), expected)


@pytest.mark.parametrize("q", [torch.zeros(2, 5), torch.zeros(6), torch.zeros(2, 6, 2, 2), torch.zeros(2, 6).int()])
def test_given_quality_of_a_wrong_shape_or_dtype_is_refused(model, q):
    with pytest.raises(ValueError, match=r"\(B, 6\)"), use_q(model, q):
        pass


def test_given_quality_of_another_batch_names_layer_and_batches(model, photographs):
    with (
        use_q(model, torch.zeros(3, 6)),
        pytest.raises(ValueError, match=r"'conv1.*batch 3.*images have batch 2"),
    ):
        model(photographs(2, 48))


def test_given_quality_to_a_model_without_quac():
    with (
        pytest.raises(ValueError, match=r"Conv2d has no QuAC.*inject"),
        use_q(nn.Conv2d(3, 3, 1), torch.ones(1, 6)),
    ):
        pass


def test_quality_has_no_gradient_unless_asked(cheap, photographs):
    for asked in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=5)
        quac.inject(model, QuACConfig(quality=cheap, norm="layer", init="paper", quality_grad=asked))
        seen = []
        observed = model.act1.quality_for
        model.act1.quality_for = lambda x, q, observed=observed, seen=seen: seen.append(observed(x, q)) or seen[-1]
        model(photographs(2, 48).requires_grad_()).sum().backward()
        assert seen[0].requires_grad == asked


# -- copies


def test_copies_are_independent_and_hold_no_quality(model, photographs):
    images = photographs(2, 48)
    expected = model(images)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, ModelEmaV3(model).module):
        with pytest.raises(QualityError, match="before any image"):
            other.act1(torch.rand(2, model.act1.channels, 8, 8))
        (context,) = contexts_of(other)
        assert context is not contexts_of(model)[0]
        assert context.q is None
        assert torch.equal(other(images), expected)
        with use_q(other, torch.full((2, 6), 9.0)):
            assert torch.equal(model(images), expected)
        parameter = next(other.parameters())
        with torch.no_grad():
            parameter.add_(1)
        assert torch.equal(model(images), expected)


def test_a_copy_made_while_an_image_is_inside_holds_no_quality(model, photographs):
    copies = []
    handle = model.layer1.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    expected = model(photographs(2, 48))
    handle.remove()
    assert contexts_of(copies[0])[0].q is None
    assert torch.equal(copies[0].eval()(photographs(2, 48)), expected)


def test_averaged_model_follows(cheap, photographs):
    model = build(cheap).train()
    average = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(photographs(4, 48)).square().mean().backward()
        optimizer.step()
        average.update(model)
    assert torch.isfinite(average.module.eval()(photographs(2, 48))).all()
    names = {name for name in average.module.state_dict() if "fc3" in name}
    assert names
    assert set(average.module.state_dict()) == set(model.state_dict())
