"""Models that are called in pieces, with several passes under way: each piece has its own input's q, or refuses."""

import copy
import itertools

import pytest
import timm
import torch
from outcomes import REFUSED, RIGHT, held_to
from torch import nn
from torch.utils.checkpoint import checkpoint

import quac_plugins as quac
from quac_plugins import PriorConfig, QuACConfig, QualityError, use_q
from quac_plugins.core.hooks import CONTEXTS

HOSTS = ("test_resnet", "test_vit", "mobilenetv3_small_050", "test_convnext")


@pytest.fixture(scope="module", params=HOSTS)
def model(request, cheap):
    torch.manual_seed(0)
    sizes = {"img_size": 48} if request.param == "test_vit" else {}
    model = timm.create_model(request.param, num_classes=5, **sizes)
    return quac.inject(model, QuACConfig(quality=cheap, norm="layer", init="paper", where="all")).eval()


@pytest.fixture(params=[False, True], ids=["plain", "with gradients"])
def grad(request):
    with torch.set_grad_enabled(request.param):
        yield request.param


@pytest.fixture
def images(photographs):
    return photographs(2, 48), photographs(4, 48)[2:] * 0.3


@pytest.fixture
def pairs(images):
    """Photographs, and noise."""
    return images, (torch.rand(2, 3, 48, 48), torch.rand(2, 3, 48, 48) * 0.3)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="eager")


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_features_of_several_images_go_through_the_head_in_any_order(model, images, grad):
    expected = [model(x) for x in images]
    for order in ((0, 1), (1, 0), (0, 1, 0, 0, 1)):
        features = [model.forward_features(x) for x in images]
        for i in order:
            assert torch.equal(model.forward_head(features[i]), expected[i])
    features = model.forward_features(images[0])
    assert torch.equal(model(images[1]), expected[1])
    assert torch.equal(model.forward_head(features), expected[0])


def test_passes_that_stop_early_leave_nothing_behind(model, images, grad):
    expected, features = model(images[1]), model.forward_features(images[1])
    for _ in range(3):
        model.forward_features(images[0])
        model.forward_intermediates(images[0], indices=[0], stop_early=True, intermediates_only=True)
        assert torch.equal(model(images[1]), expected)
        assert torch.equal(model.forward_features(images[1]), features)
        last, _ = model.forward_intermediates(images[1])
        assert torch.equal(last, features)
        assert torch.equal(model.forward_head(model.forward_features(images[1])), expected)


class Net(nn.Module):
    """Two stages that can be called in pieces, or for two images at once."""

    def __init__(self):
        super().__init__()
        self.stem, self.act1 = nn.Conv2d(3, 4, 3, stride=4), nn.ReLU()
        self.stage = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.out, self.act2 = nn.Conv2d(4, 4, 3), nn.ReLU()
        self.pieces = False

    def forward(self, x, other=None):
        x = self.begin(x)
        if other is None:
            return self.end(x)
        other = self.begin(other)
        return self.end(x), self.end(other)

    def begin(self, x):
        return self.act1(self.stem(x)) * 2

    def end(self, x):
        if self.pieces:
            x = x * 1
        return self.act2(self.out(self.stage(x))).mean((2, 3))


@pytest.fixture
def net(cheap):
    torch.manual_seed(0)
    config = QuACConfig(quality=cheap, norm="layer", init="paper", where="all")
    return quac.inject(Net(), config, torch.empty(1, 3, 48, 48)).eval()


def test_where_other_code_touched_the_features_the_graph_tells_or_it_is_an_error(net, images, grad):
    expected = [net(x) for x in images]
    assert not torch.allclose(*expected)
    for x, wanted in zip(images, expected, strict=True):
        assert torch.equal(net.end(net.begin(x)), wanted)  # one after the other is no doubt

    def siamese():
        features = [net.begin(x) for x in images]
        return [net.end(x) for x in features]

    def with_another_between():
        feature = net.begin(images[0])
        net(images[1])
        return [net.end(feature), expected[1]]

    for run in (siamese, with_another_between, lambda: net(*images)):
        if grad:
            assert all(map(torch.equal, run(), expected))
        else:
            with pytest.raises(QualityError, match=r"several batches of images.*Call the model as a whole"):
                run()
        assert torch.equal(net(images[0]), expected[0])
    a, b = (net.begin(x) for x in images)
    with pytest.raises(QualityError, match="several batches"):
        net.end(a + b)  # of both


def begins(net, kind):
    """Two ways to begin a pass, of which so much is compiled, and what may come between them."""
    if kind == "first":
        return compiled(net.begin), net.begin, lambda x: None
    if kind == "second":
        return net.begin, compiled(net.begin), lambda x: None
    if kind == "both":
        return (compiled(net.begin),) * 2 + (lambda x: None,)
    if kind == "whole between":
        return net.begin, compiled(net), lambda x: None
    return net.begin, net.begin, lambda x: net.stem.compile(backend="eager")


@pytest.mark.parametrize("kind", ["first", "second", "both", "whole between", "stem later"])
def test_compiled_code_begins_passes_as_other_code_does(kind, net, pairs, grad):
    expected = [[net(x) for x in pair] for pair in pairs]
    first, second, between = begins(net, kind)
    for (a, b), (wanted, _) in zip(pairs, expected, strict=True):
        features = first(a)
        between(a)
        second(b)
        with held_to(RIGHT if grad and kind not in ("first", "both") else REFUSED):  # the graph leads to no pass
            close(net.end(features), wanted)
        close(net(a), wanted)


def test_what_ran_in_compiled_code_does_not_wait_for_it(net, pairs):
    def middle(x):
        return net.stage(net.begin(x))

    def end(x):
        return net.act2(net.out(x)).mean((2, 3))

    with torch.no_grad():
        expected = [[net(x) for x in pair] for pair in pairs]
        run = compiled(middle)
        for pair, wanted in zip(pairs, expected, strict=True):
            for i in (0, 1, 0):
                torch.testing.assert_close(end(run(pair[i]) * 1), wanted[i])
        for pair, wanted in zip(pairs, expected, strict=True):
            run(pair[0])
            torch.testing.assert_close(end(middle(pair[1])), wanted[1])


def test_a_compiled_call_in_several_graphs_goes_on_with_its_own_pass(net, pairs):
    with torch.no_grad():
        expected = [net(x) for pair in pairs for x in pair]
        net.stage[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        run = compiled(net)
        for x, wanted in zip([x for pair in pairs for x in pair], expected, strict=True):
            torch.testing.assert_close(run(x), wanted)


def test_a_part_called_by_hand_after_the_models_call_is_an_error_unless_its_input_is_known(net, pairs):
    returned = []
    net.stage.register_forward_hook(lambda part, args, output: returned.append(output))
    with torch.no_grad():
        for a, b in pairs:
            returned.clear()
            expected, q = net(a), net.act1.context.q
            with pytest.raises(QualityError, match=r"'stage\.1' was called .*on its own after .*ended.*use_q"):
                net.stage(torch.rand(2, 4, 11, 11))
            net(b)
            torch.testing.assert_close(net.act2(net.out(returned[0])).mean((2, 3)), expected)
            with use_q(net, q):
                net(b)
                torch.testing.assert_close(net.end(net.begin(a)), expected)


def test_a_part_called_by_hand_after_a_compiled_call_goes_on_with_it(net, images):
    """As the tap's docstring says: such a call cannot be seen to end."""
    x = torch.rand(2, 4, 11, 11)
    with torch.no_grad():
        compiled(net)(images[0])
        found = net.stage(x)
        with use_q(net, net.act1.context.q.clone()):
            assert torch.equal(net.stage(x), found)


def test_a_part_called_again_for_an_older_pass_is_refused_once_while_another_waits(net, pairs):
    for a, b in pairs:
        expected = net(a)
        features = net.begin(a)
        net.end(features)
        later = net.begin(b)
        with held_to(REFUSED):
            net.end(features)
        close(net.end(later), net(b))
        close(net.end(features), expected)


def test_a_pass_that_waits_is_not_forgotten(net, images):
    with torch.no_grad():
        waiting = net.begin(images[0])
        for _ in range(40):
            net.end(net.stem(images[1]))
        net.begin(images[1])
        with pytest.raises(QualityError, match="several batches"):
            net.end(waiting)


def test_a_recomputation_does_not_change_whose_turn_it_is(net, pairs):
    for a, b in pairs:
        with torch.no_grad():
            expected = net(a)
        output = checkpoint(net, b.clone().requires_grad_(), use_reentrant=False)
        with torch.no_grad():
            features = net.begin(a)
        output.sum().backward()
        with torch.no_grad():
            assert torch.equal(net.end(features), expected)


@pytest.mark.usefixtures("fresh_dynamo")  # what was compiled too often runs eagerly, and leaves a mark
@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_images_made_by_another_pass_have_a_quality_of_their_own_or_are_refused(kind, net, pairs):
    """The graph leads from the second pass past its compiled stem, which leaves no mark, to the first."""

    def image_of(features):
        return torch.sigmoid(nn.functional.interpolate(features[:, :3], size=(48, 48)))

    def gradient(images, run):
        net.zero_grad()
        x = net.stem(image_of(net.act1(net.stem(images)))) * 2
        run(net.stage, x).square().sum().backward()
        return net.stem.weight.grad.clone()

    expected = [gradient(a, lambda part, x: part(x)) for a, _ in pairs]
    if kind == "compiled":
        net.stem.compile(backend="eager")
    for (a, _), wanted in zip(pairs, expected, strict=True):
        with held_to(RIGHT if kind == "eager" else REFUSED):
            close(gradient(a, lambda part, x: checkpoint(part, x, use_reentrant=False)), wanted)


def test_given_quality_goes_before_where_the_input_came_from(net, images):
    with torch.no_grad():
        feature = net.stem(images[0])
        with use_q(net, torch.zeros(2, 6)):
            given = net.stage(feature)
        own = net.stage(feature)
        assert not torch.allclose(given, own)
        net(images[1])
        assert torch.equal(net.stage(feature), own)


def test_a_call_that_breaks_off_confuses_no_later_one(net, images):
    with torch.no_grad():
        expected = [net(x) for x in images]
        for error, part in itertools.product((KeyboardInterrupt, ValueError), (net.stem, net.stage[0], net.out)):

            def break_off(*_, error=error):
                raise error

            handle = part.register_forward_hook(break_off)
            with pytest.raises(error):
                net(images[0])
            handle.remove()
            assert torch.equal(net(images[1]), expected[1])
        net.begin(images[0])
        features = [net.begin(x) for x in images]
        with pytest.raises(QualityError, match="several batches"):
            net.end(features[0])


def test_a_replaced_first_layer_is_an_error_also_while_the_old_one_is_kept(net, images):
    net(images[0])
    old, net.stem = net.stem, nn.Conv2d(3, 4, 3, stride=4)
    with pytest.raises(QualityError, match=r"'act1'.*'stem' is called \(if it was replaced"):
        net(images[1])
    net.stem = old
    assert net(images[1]).shape == (2, 4)


def test_what_is_put_in_to_know_it_is_taken_out(cheap, images):
    plain = Net()
    host = copy.deepcopy(plain)
    example = torch.empty(1, 3, 48, 48)
    quac.inject(host, QuACConfig(quality=cheap), example)
    quac.inject(host, PriorConfig(experts=["fog"], quality="brisque_tone", site="stage"), example)
    copied = copy.deepcopy(host)
    assert len(copied.stage.__dict__[CONTEXTS]) == 2
    assert copied.stage.__dict__[CONTEXTS][0] is copied.act1.context is not host.act1.context
    for one in (host, copied):
        quac.remove(one)
        for (name, before), (_, after) in zip(plain.named_modules(), one.named_modules(), strict=True):
            assert vars(before).keys() == vars(after).keys(), name
            assert not after._forward_hooks, name
            assert not after._forward_pre_hooks, name
            assert not after._forward_hooks_always_called, name
