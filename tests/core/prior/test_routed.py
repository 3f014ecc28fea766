"""The routed prior: each image is repaired by the experts that its quality asks for, and by no others."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quac_plugins import QualityError
from quac_plugins.core.prior.routed import Gate, RoutedFDM
from quac_plugins.core.prior.sites import PriorSite
from quac_plugins.core.quality.context import QualityContext

EXPERTS, Q = 4, 6


def site_of(layout="nchw", stride=2):
    tokens = layout == "tokens"
    return PriorSite("layer1", 8, layout, 1 if tokens else 0, (6, 6) if tokens else None, stride)


def features(layout="nchw", batch=6):
    shape = {"nchw": (8, 7, 9), "nhwc": (7, 9, 8), "tokens": (37, 8)}[layout]
    return torch.randn(batch, *shape) * 2


def routed(layout="nchw", top_k=1, fdm="light", act="relu", experts=EXPERTS):
    """A prior whose experts all differ, and whose gate sends image i to choice i of q's first columns."""
    torch.manual_seed(0)
    module = RoutedFDM(site_of(layout), fdm, experts, Q, top_k, act=act).eval()
    with torch.no_grad():
        for tensor in module.experts.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
        for layer in (module.gate.fc1, module.gate.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
            size = experts + 1
            layer.weight[:size, :size] = torch.eye(size)
    module.context = QualityContext(Q)
    return module


def asking_for(*choices, sharpness=5.0):
    """q of images that ask for these choices; 0 is the identity."""
    q = torch.zeros(len(choices), Q)
    q[torch.arange(len(choices)), list(choices)] = sharpness
    return q


def given(module, x, q):
    module.context.begin(q)
    return module(x)


# -- which experts


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "tokens"])
@pytest.mark.parametrize("fdm", ["light", "ncrf"])
def test_the_best_expert_alone_repairs_each_image_of_a_mixed_batch(layout, fdm):
    module, x, choices = routed(layout, fdm=fdm), features(layout), (2, 0, 4, 2, 1, 3)
    with torch.no_grad():
        y = given(module, x, asking_for(*choices))
        for i, choice in enumerate(choices):
            image = x[i : i + 1]
            if choice:
                torch.testing.assert_close(y[i : i + 1], module.experts[choice - 1](image), atol=1e-5, rtol=1e-5)
                assert not torch.allclose(y[i : i + 1], image)
            else:
                assert torch.equal(y[i : i + 1], image)


def test_real_features(photographs):
    module = RoutedFDM(PriorSite("stem", 3, "nchw", stride=1), "light", EXPERTS, Q)
    module.load_state_dict({k: v for k, v in routed().state_dict().items() if k.startswith("gate")}, strict=False)
    module.context = QualityContext(Q)
    with torch.no_grad():
        for tensor in module.experts.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    images = photographs(4, 45)
    y = given(module, images, asking_for(1, 0, 3, 3))
    torch.testing.assert_close(y[2:], module.experts[2](images[2:]))
    assert torch.equal(y[1], images[1])


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS, EXPERTS + 1, 99])
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
def test_the_sum_over_the_top_k_is_the_formula(top_k, layout):
    module, x = routed(layout, top_k), features(layout)
    q = torch.rand(6, Q) * 3
    with torch.no_grad():
        weights = module.gate(q).softmax(1)
        kept = weights.topk(min(top_k, EXPERTS + 1), dim=1)
        weights = torch.zeros_like(weights).scatter(1, kept.indices, kept.values / kept.values.sum(1, keepdim=True))
        torch.testing.assert_close(weights.sum(1), torch.ones(6))
        expected = x.clone()
        for index, expert in enumerate(module.experts):
            expected += weights[:, index + 1].view(-1, *[1] * (x.ndim - 1)) * (expert(x) - x)
        torch.testing.assert_close(given(module, x, q), expected, atol=1e-5, rtol=1e-4)
        module.soft = top_k > EXPERTS
        torch.testing.assert_close(given(module, x, q), expected, atol=1e-5, rtol=1e-4)


def test_soft_mixes_all_and_gives_all_a_gradient():
    module, x = routed(top_k=1), features()
    module.soft = True
    given(module, x, asking_for(0, 0, 1, 1, 2, 2, sharpness=1.0)).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(bool(expert.body[-1].weight.grad.any()) for expert in module.experts)
    assert bool(module.gate.fc2.weight.grad.any())


def test_only_the_experts_that_were_asked_run():
    module, ran = routed(), []
    for index, expert in enumerate(module.experts):
        expert.register_forward_hook(lambda _, args, __, index=index: ran.append((index, len(args[0]))))
    given(module, features(), asking_for(2, 0, 4, 2, 0, 2))
    assert ran == [(1, 3), (3, 1)]
    ran.clear()
    given(module, features(), asking_for(*[0] * 6))
    assert ran == []


def test_only_sends_all_images_to_one_expert_without_looking_at_q():
    module, x = routed(), features()
    module.context, module.only = None, 2
    torch.testing.assert_close(module(x), module.experts[2](x))


@pytest.mark.parametrize("top_k", [1, 2])
def test_images_do_not_depend_on_their_batch(top_k):
    module, x, q = routed(top_k=top_k), features(), torch.rand(6, Q) * 4
    with torch.no_grad():
        whole = given(module, x, q)
        for rows in ([3], [5, 0], [1, 1, 4, 2]):
            torch.testing.assert_close(given(module, x[rows], q[rows]), whole[rows], atol=1e-5, rtol=1e-5)
        assert given(module, x[:0], q[:0]).shape == (0, 8, 7, 9)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_it_is_the_identity_bit_for_bit(top_k, dtype):
    module = RoutedFDM(site_of(), "light", EXPERTS, Q, top_k).to(dtype)
    module.context = QualityContext(Q)
    x = features().to(dtype)
    for soft in (False, True):
        module.soft = soft
        assert torch.equal(given(module, x, torch.rand(6, Q) * 9), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(given(module, x, torch.rand(6, Q)), x)


# -- the gate


def test_the_gate_standardizes_q_and_no_outlier_runs_away():
    gate = routed().gate
    gate.mean.copy_(torch.arange(6.0))
    gate.std.copy_(torch.arange(6.0) + 1)
    q = torch.randn(3, Q) * 4
    z = ((q - gate.mean) / gate.std).clamp(-4, 4)
    torch.testing.assert_close(gate(q), gate.fc2(gate.fc1(z).relu()))
    assert torch.equal(gate(torch.full((1, Q), 1e30)), gate(torch.full((1, Q), 1e6)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gate_measures_in_full_precision(dtype):
    gate = routed().gate
    gate.mean.copy_(torch.full((Q,), 100.0))  # which half precision rounds exactly, but not what lies beside it
    narrow = copy.deepcopy(gate).to(dtype)
    q = 100 + torch.rand(5, Q) * 0.2
    assert torch.equal(narrow(q), gate(q))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(q), narrow(q))


def test_only_a_fitted_gate_is_no_longer_fresh():
    gate = Gate(Q, 3)
    assert gate.is_fresh
    for change in (lambda g: g.mean.add_(1), lambda g: g.std.mul_(2), lambda g: g.fc2.weight.data.add_(1)):
        other = copy.deepcopy(gate)
        change(other)
        assert not other.is_fresh


# -- without q


def test_no_quality_or_that_of_another_batch_is_an_error_that_names_the_site():
    module = routed()
    with pytest.raises(QualityError, match=r"'layer1' was called before any image"):
        module(features())
    module.context.begin(torch.rand(5, Q))
    with pytest.raises(QualityError, match=r"'layer1' got features of 6 images, but quality features of 5"):
        module(features())
    module.context = None
    with pytest.raises(QualityError, match=r"'layer1' has no quality features"):
        module(features())


def test_copies_and_threads_keep_to_their_own():
    module, x = routed(), features()
    expected = given(module, x, asking_for(1, 2, 3, 4, 0, 1))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.context is not module.context
        assert torch.equal(given(other, x, asking_for(1, 2, 3, 4, 0, 1)), expected)

    def work(i):
        torch.set_num_threads(1)
        with torch.no_grad():
            return [given(module, x[i : i + 1], asking_for(i % 5)) for _ in range(20)]

    with ThreadPoolExecutor(6) as pool:
        for i, outputs in enumerate(pool.map(work, range(6))):
            alone = module.experts[i % 5 - 1](x[i : i + 1]) if i % 5 else x[i : i + 1]
            assert all(torch.allclose(y, alone, atol=1e-5) for y in outputs)


# -- graphs


class Given(torch.nn.Module):
    """q as an input of the graph."""

    def __init__(self, module):
        super().__init__()
        self.module, self.context = module, module.context

    def forward(self, x, q):
        self.context.begin(q)
        return self.module(x)


@pytest.mark.parametrize(("layout", "top_k", "act"), [("nchw", 1, "relu"), ("tokens", 2, "meta_acon")])
def test_graphs_route_as_eager_does(layout, top_k, act):
    model, x, q = Given(routed(layout, top_k, act=act, experts=2)), features(layout, 5), torch.rand(5, Q) * 4
    torch._dynamo.reset()
    images = torch.export.Dim("images", min=2, max=64)
    dynamic = ({0: images}, {0: images})
    exported = [torch.export.export(model, (x, q), dynamic_shapes=dynamic, strict=s).module() for s in (False, True)]
    runs = {torch.jit.trace(model, (x, q)): (5, 2, 3)} | dict.fromkeys(exported, (5, 2, 3))
    # compiled again for other sizes, which takes long where there are many operations
    runs[torch.compile(model, fullgraph=True, backend="aot_eager")] = (5, 2, 3) if layout == "nchw" else (5,)
    for run, sizes in runs.items():
        for rows in sizes:
            args = x.flip(0)[:rows] * 2, q[:rows]
            torch.testing.assert_close(run(*args), model(*args), atol=1e-5, rtol=1e-4)


def test_gradients_through_a_graph():
    model, x, q = Given(routed(experts=2)), features(batch=3), asking_for(2, 0, 1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model(x, q).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    compiled(x, q).square().sum().backward()
    for name, parameter in model.named_parameters():
        wanted = expected[name] if expected[name] is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-3, rtol=1e-3, msg=name)


def test_a_gate_of_quantized_layers_chooses_as_before():
    """Int8 layers in the places of its own, as torch's dynamic quantization puts them there."""
    from torch.ao.nn.quantized.dynamic import Linear

    module, x, q = routed(top_k=2), features(batch=5), asking_for(0, 1, 2, 3, 4, sharpness=3.0)
    expected = given(module, x, q)
    small = copy.deepcopy(module)
    for name in ("fc1", "fc2"):
        layer = getattr(small.gate, name)
        layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
        setattr(small.gate, name, Linear.from_float(layer))
    found = given(small, x, q)
    assert not small.gate.is_fresh
    assert torch.equal(small.gate(q).argmax(dim=1), module.gate(q).argmax(dim=1))
    assert (found - expected).abs().max() < 0.02 * (expected - x).abs().max()
