"""What all activations share: layouts, precision, norms, expansion of q, errors that name the layer and the shapes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from quac_plugins.core.activations import ACTIVATIONS, resolve_activation
from quac_plugins.core.activations.driver import EXPANSIONS, NORMS, DrivenActivation, make_norm
from quac_plugins.core.quality.context import QualityError

ALL = sorted(ACTIVATIONS)
DRIVEN = [name for name in ALL if issubclass(ACTIVATIONS[name], DrivenActivation)]
NEED_Q = [name for name in ALL if ACTIVATIONS[name].needs_quality]


def make(name, channels=8, norm="layer", **kwargs):
    cls = ACTIVATIONS[name]
    if name in DRIVEN:
        kwargs["norm"] = norm
    if name in NEED_Q:
        kwargs.setdefault("quality_channels", 6)
    module = cls(channels, **kwargs)
    module.layer = "stage.act"
    return module


def arguments(name, batch=4):
    return (torch.randn(batch, 6),) if name in NEED_Q else ()


def test_six_activations_are_found_by_name():
    assert ALL == ["acon", "meta_acon", "qacon", "qgelu", "qprelu", "qswish"]
    assert NEED_Q == ["qacon", "qgelu", "qprelu", "qswish"]
    for name in ALL:
        assert resolve_activation(name).name == name


@pytest.mark.parametrize("wrong", ["qakon", "SiLU", "", 5, None])
def test_unknown_activation_lists_those_there_are(wrong):
    with pytest.raises(ValueError, match="acon, meta_acon, qacon, qgelu, qprelu, qswish"):
        resolve_activation(wrong)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_channels_last_axis_is_the_transpose_of_channels_first(name, norm, training):
    first = make(name, norm=norm).train(training)
    last = make(name, norm=norm, channel_dim=-1).train(training)
    last.load_state_dict(first.state_dict())
    x, q = torch.randn(4, 8, 5, 3), arguments(name)
    expected = first(x, *q)
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1), *q).permute(0, 3, 1, 2), expected, atol=1e-5, rtol=1e-5)
    tokens = last(x.flatten(2).transpose(1, 2), *q).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first(x.flatten(2), *q).reshape(x.shape), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_follows_a_linear_layer(name):
    flat, square = make(name), make(name)
    square.load_state_dict(flat.state_dict())
    x, q = nn.Linear(5, 8)(torch.randn(4, 5)), arguments(name)
    torch.testing.assert_close(flat(x, *q), square(x[:, :, None, None], *q).flatten(1))
    assert make(name, channel_dim=-1)(x, *q).shape == (4, 8)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(4, 8, 4, 6), (4, 8), (4, 8, 3, 4, 5)])
def test_memory_format_changes_nothing(name, shape):
    module, q = make(name).eval(), arguments(name)
    x = torch.randn(shape)
    strided = torch.empty(*reversed(shape)).permute(*reversed(range(len(shape)))).copy_(x)
    assert len(shape) == 2 or strided.stride() != x.stride()
    torch.testing.assert_close(module(strided, *q), module(x, *q))
    if len(shape) == 4:
        y = module(x.to(memory_format=torch.channels_last), *q)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, module(x, *q))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("init", ["paper", "preserve"])
def test_gradients_in_double_precision(name, init):
    module = make(name, channels=3, init=init, host=nn.SiLU() if init == "preserve" else None).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    q = tuple(torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in arguments(name))
    names = [n for n, p in module.named_parameters() if p.requires_grad]

    def function(x, *rest):
        parameters = dict(zip(names, rest[len(q) :], strict=True))
        return torch.func.functional_call(module, parameters, (x, *rest[: len(q)]))

    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(function, (x, *q, *parameters))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 6e4), (torch.bfloat16, 1e15), (torch.float32, 1e15)], ids=str
)
@pytest.mark.parametrize("whole", [False, True], ids=["module in float32", "module in the dtype"])
def test_large_values_stay_finite_and_keep_their_dtype(name, norm, dtype, largest, whole):
    module = make(name, channels=64, norm=norm, init="preserve", host=nn.ReLU()).eval()
    with torch.no_grad():
        for n, p in module.named_parameters():
            if n.startswith("fc"):
                p.copy_(torch.randn_like(p))
    if whole:
        module = module.to(dtype)
    x = torch.randn(4, 64, 4, 4).sign() * largest
    x[0], x[1], x[2] = largest, -largest, 0
    if name == "qprelu":  # its slope multiplies x itself, without a bound: only what does not leave the dtype is finite
        x = x / largest * 10
    y = module(x.to(dtype), *arguments(name))
    assert y.dtype == dtype
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_and_computes_as_in_float32(name, dtype):
    module, q = make(name).eval(), arguments(name)
    x = torch.randn(4, 8, 6, 6).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = module(x, *q)
    assert y.dtype == dtype
    torch.testing.assert_close(y, module(x.float(), *q).to(dtype))


@pytest.mark.parametrize("name", DRIVEN)
@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_batch_of_one_trains_without_batch_norm(name, norm):
    module = make(name, norm=norm)
    module(torch.randn(1, 8, 4, 4), *arguments(name, 1)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("name", DRIVEN)
def test_batch_of_one_with_batch_norm_says_what_to_use(name):
    module = make(name, norm="batch")
    with pytest.raises(ValueError, match=r"'stage\.act'.*norm='batch'.*batch of one.*'layer', 'group' or 'none'"):
        module(torch.randn(1, 8, 4, 4), *arguments(name, 1))
    assert module.eval()(torch.randn(1, 8, 4, 4), *arguments(name, 1)).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("kernels", ["plain", "native"])
def test_batch_of_one_trains_with_frozen_batch_norms_whatever_computes_it(kernels, monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", kernels)
    module = make("qacon", norm="batch")
    x, others = torch.randn(1, 8, 4, 4), arguments("qacon", 1)
    expected = module.eval()(x, *others)
    module.train()
    module.bn1.eval()
    with pytest.raises(ValueError, match="batch of one"):  # one of them still learns
        module(x, *others)
    module.bn2.eval()
    torch.testing.assert_close(module(x, *others), expected)
    module.eval().bn1.train()
    with pytest.raises(ValueError, match="batch of one"):
        module(x, *others)


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_without_batch_norm_an_image_does_not_depend_on_its_neighbours(norm):
    module = make("qacon", norm=norm)
    x, q = torch.randn(4, 8, 5, 5), torch.randn(4, 6)
    alone = torch.cat([module(x[i : i + 1], q[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(module(x, q), alone)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 16, 44, 100, 128, 2084])
def test_group_norm_divides_every_width(width):
    norm = make_norm("group", width)
    assert width % norm.num_groups == 0
    assert norm.num_groups == 1 or width // norm.num_groups >= 4
    assert norm(torch.randn(2, width, 1, 1)).shape == (2, width, 1, 1)


def test_unknown_names_list_the_known():
    for kwargs, known in (
        ({"norm": "instance"}, NORMS),
        ({"expand_q": "repeat"}, EXPANSIONS),
        ({"init": "zero"}, ("paper", "preserve")),
    ):
        with pytest.raises(ValueError, match=", ".join(known)):
            ACTIVATIONS["qacon"](8, **kwargs)
    for kwargs in ({"channel_dim": 2}, {"reduction": 0}, {"quality_channels": -1}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            ACTIVATIONS["qacon"](8, **kwargs)
    with pytest.raises(ValueError, match="channels"):
        ACTIVATIONS["qacon"](0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("shape", "channel_dim"), [((4, 9, 4, 4), 1), ((4, 8, 4, 9), -1), ((8,), 1)])
def test_wrong_channels_name_layer_and_shape(name, shape, channel_dim):
    module = make(name, channel_dim=channel_dim)
    axis = "axis 1" if channel_dim == 1 else "the last axis"
    shown = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"'stage\.act'.*8 channels on {axis}, got shape {shown}"):
        module(torch.randn(shape), *arguments(name))


@pytest.mark.parametrize("name", NEED_Q)
@pytest.mark.parametrize("shape", [(4, 5), (4, 6, 1), (4, 6, 2, 2), (6,)])
def test_wrong_width_of_quality_names_layer_and_shapes(name, shape):
    shown = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"'stage\.act'.*\(B, 6\), got {shown}"):
        make(name)(torch.randn(4, 8, 2, 2), torch.randn(shape))


@pytest.mark.parametrize("name", NEED_Q)
@pytest.mark.parametrize(("rows", "images"), [(4, 2), (2, 4), (4, 3), (4, 0), (4, 1)])
def test_another_batch_of_quality_is_an_error_that_names_layer_and_shapes(name, rows, images):
    message = rf"'stage\.act' got {rows} rows \(x \({rows}, 8, 2, 2\)\).*{images} images \(q \({images}, 6\)\).*tile"
    with pytest.raises(QualityError, match=message):
        make(name)(torch.randn(rows, 8, 2, 2), torch.randn(images, 6))


@pytest.mark.parametrize("name", NEED_Q)
@pytest.mark.parametrize("times", [1, 2, 5])
def test_expansion_equals_writing_the_rows_out(name, times):
    x, q = torch.randn(3 * times, 8, 2, 2), torch.randn(3, 6)
    for policy, rows in (
        ("interleave", [image for image in q for _ in range(times)]),
        ("tile", [image for _ in range(times) for image in q]),
    ):
        module = make(name, expand_q=policy).eval()
        torch.testing.assert_close(module(x, q), module(x, torch.stack(rows)))
        with pytest.raises(QualityError, match=r"'stage\.act'"):
            module(torch.randn(4, 8, 2, 2), q)


@pytest.mark.parametrize("name", NEED_Q)
def test_no_quality_at_all_names_the_layer(name):
    with pytest.raises(QualityError, match=r"'stage\.act' has no quality features"):
        make(name)(torch.randn(2, 8, 2, 2))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("init", ["paper", "preserve"])
def test_compiles_without_a_graph_break(name, init):
    torch._dynamo.reset()
    module = make(name, init=init).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (2, 4):
        x, q = torch.randn(batch, 8, 3, 3), arguments(name, batch)
        torch.testing.assert_close(compiled(x, *q), module(x, *q))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ALL)
def test_copies_and_pickles_compute_the_same_and_share_nothing(name):
    module = make(name, init="preserve", host=nn.PReLU()).eval()
    x, q = torch.randn(4, 8, 3, 3), arguments(name)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x, *q), module(x, *q))
        assert not {id(p) for p in other.parameters()} & {id(p) for p in module.parameters()}


@pytest.mark.parametrize("name", ALL)
def test_double_input_to_a_single_precision_module_keeps_double(name):
    module = make(name).eval()
    x, q = torch.randn(4, 8, 3, 3, dtype=torch.float64), arguments(name)
    y = module(x, *q)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), module(x.float(), *q), atol=1e-5, rtol=1e-5)


def test_repr_tells_channels_layout_and_quality():
    assert "8, channel_dim=-1, init='paper', Q=6, r=16, norm='layer'" in repr(make("qacon", channel_dim=-1))


def results(site, x, *q):
    """y, every gradient, and the state that is left, which is then as before."""
    state, own = copy.deepcopy(site.state_dict()), site
    own.zero_grad()
    x, *q = (t.clone().requires_grad_() for t in (x, *q))
    y = own(x, *q)
    y.backward(torch.ones_like(x).cumsum(-1) / x.shape[-1])
    gradients = {name: p.grad for name, p in own.named_parameters()}
    buffers = {name: tensor.clone() for name, tensor in own.named_buffers()}
    own.load_state_dict(state)
    return {"y": y, "x": x.grad, "q": [t.grad for t in q], **gradients, **buffers}


def by_kernels_and_by_operation(monkeypatch, site, *inputs):
    found = []
    for choice in ("native", "plain"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        found.append(results(site, *inputs))
    return found


@pytest.mark.filterwarnings("error:native kernels")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", DRIVEN)
def test_kernels_give_the_numbers_the_gradients_and_the_statistics_of_the_operations(name, norm, training, monkeypatch):
    for init, host, layout in (
        ("paper", None, "rows"),
        ("preserve", nn.ReLU(), "last"),
        ("preserve", nn.GELU(), "tokens"),
    ):
        torch.manual_seed(0)
        site = make(name, 19, norm, init=init, host=host, channel_dim=-1 if layout == "tokens" else 1)
        for parameter in site.parameters():
            nn.init.normal_(parameter, std=0.3)
        x, q = torch.randn(6, 19, 13, 11, dtype=torch.float64), (t.double() for t in arguments(name, 6))
        x = x.flatten(2).transpose(1, 2) if layout == "tokens" else x
        x = x.contiguous(memory_format=torch.channels_last) if layout == "last" else x
        found, expected = by_kernels_and_by_operation(monkeypatch, site.double().train(training), x, *q)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def hooked(site):
    site.fc3.register_forward_hook(lambda module, inputs, output: output * 2)


def hooked_before(site):
    site.bn1.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def hooked_behind(site):
    site.fc2.register_full_backward_hook(lambda module, by_input, by_output: (by_input[0] * 2,))


def replaced(site):
    site.fc1 = nn.Conv2d(14, 16, 1)
    site.bn2 = nn.BatchNorm2d(14, track_running_stats=False)


def pruned(site):
    prune.l1_unstructured(site.fc1, "weight", 0.5)
    prune.identity(site, "p1")


@pytest.mark.parametrize(
    "change",
    [hooked, hooked_before, hooked_behind, replaced, lambda site: parametrizations.weight_norm(site.fc1), pruned],
)
def test_what_is_put_on_a_drivers_layers_counts(change, monkeypatch):
    torch.manual_seed(0)
    site, x, q = make("qacon", norm="batch"), torch.randn(4, 8, 6, 6), torch.randn(4, 6)
    before, _ = by_kernels_and_by_operation(monkeypatch, site, x, q)
    change(site)
    found, expected = by_kernels_and_by_operation(monkeypatch, site.eval(), x, q)
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-4, atol=1e-4)
    assert not torch.equal(found["x"], before["x"])


class Shifted(ACTIVATIONS["qacon"]):
    """A subclass that drives its numbers in a way of its own."""

    def head(self, h):
        return super().head(h) + 1


def test_a_subclass_drives_in_its_own_way(monkeypatch):
    site = Shifted(8, 6, norm="layer")
    found, expected = by_kernels_and_by_operation(monkeypatch, site, torch.randn(2, 8, 4, 4), torch.randn(2, 6))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", ["plain", "native"])
def test_the_tap_is_asked_once_and_a_hosts_error_is_raised(kernels, monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", kernels)
    site, asked = make("qacon", init="preserve", host=nn.GELU()), []
    site.context = type("Context", (), {"current": lambda *_: asked.append(1) or torch.zeros(2, 6), "mark": print})()
    site(torch.randn(2, 8, 4, 4))
    assert len(asked) == 1

    def stop(module, inputs, output):
        raise KeyError("mine")

    site.host.register_forward_hook(stop)
    with pytest.raises(KeyError, match="mine"):
        site(torch.randn(2, 8, 4, 4))
