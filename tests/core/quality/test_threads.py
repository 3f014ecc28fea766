"""Threads that share one model, compiled or not, in part or whole: each has its own q, or an error says why not."""

import contextlib
import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from outcomes import REFUSED, RIGHT, held_to
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import quac_plugins as quac
from quac_plugins import QuACConfig, use_q
from quac_plugins.core.quality.given import contexts_of, quality_given

OPTIONS = {"backend": "eager", "fullgraph": True}


class Small(nn.Module):
    """Three activations, so that it is compiled in no time."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 4, 3, stride=4), nn.ReLU()
        self.layer2, self.layer3 = (nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        return self.layer3(self.layer2(self.act1(self.conv1(x)))).mean((2, 3))


def build(cheap, **kwargs):
    torch.manual_seed(0)
    config = QuACConfig(quality=cheap, norm="layer", init="paper", where="all", **kwargs)
    return quac.inject(Small(), config, torch.empty(1, 3, 48, 48)).eval()


@pytest.fixture(scope="module")
def reference(cheap):
    return build(cheap)


@pytest.fixture
def model(reference):
    torch._dynamo.reset()
    yield copy.deepcopy(reference)
    torch._dynamo.reset()


@pytest.fixture
def images(photographs):
    return photographs(2, 48), photographs(4, 48)[2:] * 0.3


@pytest.fixture
def other():
    """Runs a function in one other thread, without gradients, and waits for it."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function: pool.submit(torch.no_grad()(function)).result()


def compiled(model, kind):
    """A function that runs the model, of which so much is compiled."""
    if kind == "whole":
        return torch.compile(model, **OPTIONS)
    for part in {"stem": ["conv1"], "part": ["layer2"], "both": ["conv1", "layer2"], "none": []}[kind]:
        model.get_submodule(part).compile(**OPTIONS)
    return model


def in_steps(model, images, between):
    """What the model computes, with something in between."""
    x = model.conv1(images)
    between()
    x = model.act1(x)
    between()
    x = model.layer2(x)
    between()
    return model.layer3(x).mean((2, 3))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["whole", "stem", "part", "both", "none"])
def test_another_thread_in_between_changes_nothing(kind, model, reference, images, other):
    ours, theirs = images
    with torch.no_grad():
        expected, expected_theirs = reference(ours), reference(theirs)
        assert (expected - expected_theirs).abs().max() > 1e-3
        run = compiled(model, kind)
        run(ours)  # before: threads that compile wait for each other
        found = []
        for steps in (model, run):
            result = in_steps(steps, ours, lambda: found.append(other(lambda: run(theirs))))
            close(result, expected)
        for one in found:
            close(one, expected_theirs)
        if kind not in ("part", "both"):  # which is an error: the graph does not know the thread's batch
            close(in_steps(model, ours, lambda: other(lambda: run(theirs[:1]))), expected)


@pytest.mark.parametrize("kind", ["whole", "stem", "none"])
def test_quality_given_in_threads_whose_blocks_overlap(kind, model, reference, images, other):
    ours, theirs = images
    one, two = torch.full((2, 6), 1.0), torch.full((2, 6), 4.0)

    def of(network, x, q):
        with use_q(network, q):
            return network(x)

    with torch.no_grad():
        plain, given = reference(ours), of(reference, ours, one)
        plain_theirs, given_theirs = reference(theirs), of(reference, theirs, two)
        run = compiled(model, kind)
        # a graph without a given q is not the one of it: the thread for which it was not made has to be told
        refused = REFUSED if kind != "none" else RIGHT

        def check(outcome, x, expected):
            with held_to(outcome, match="give each thread a copy"):
                close(run(x), expected)

        with use_q(model, one):
            close(run(ours), given)
            other(lambda: check(refused, theirs, plain_theirs))
            check(RIGHT, ours, given)

            def overlapping():
                block = contextlib.ExitStack()
                block.enter_context(use_q(model, two))
                close(run(theirs), given_theirs)
                return block

            block = other(overlapping)
            close(run(ours), given)  # also compiled: the graph of a given q takes the thread's own
        other(lambda: check(RIGHT, theirs, given_theirs))
        check(refused, ours, plain)
        other(block.close)
        for _ in range(2):
            close(run(ours), plain)
            other(lambda: close(run(theirs), plain_theirs))


def test_quality_given_by_generators_ends_with_each_in_any_order(reference, images):
    one, two = torch.full((2, 6), 1.0), torch.full((2, 6), 4.0)

    def giving(q):
        with use_q(reference, q):
            while True:
                yield reference(images[0])

    with torch.no_grad():
        plain = reference(images[0])
        first, second = giving(one), giving(two)
        of_one, of_two = next(first), next(second)
        assert not torch.allclose(of_one, of_two)
        first.close()
        assert torch.equal(reference(images[0]), of_two)
        second.close()
        assert torch.equal(reference(images[0]), plain)
        third = giving(one)
        next(third)
        with ThreadPoolExecutor(1) as pool:  # as the garbage collector may close it
            pool.submit(third.close).result()
        assert torch.equal(reference(images[0]), plain)
        assert contexts_of(reference)[0].given is None


def test_quality_given_inside_compiled_code_stays_there(model, reference, images):
    q = torch.full((2, 6), 4.0)

    def inside(network, x):
        with quality_of_context(network, q):
            y = network(x)
        return y, network(x)

    def quality_of_context(network, q):
        return quality_given([(network.act1.context, q)])

    with torch.no_grad():
        expected = inside(reference, images[0])
        assert not torch.allclose(*expected)
        run = torch.compile(inside, **OPTIONS)
        for _ in range(2):
            for found, wanted in zip(run(model, images[0]), expected, strict=True):
                close(found, wanted)
        with use_q(model, q + 1), use_q(reference, q + 1):
            for found, wanted in zip(run(model, images[0]), inside(reference, images[0]), strict=True):
                close(found, wanted)


@pytest.mark.parametrize("kind", ["stem", "part"])
def test_gradients_of_the_quality_are_refused_where_another_thread_came_between(kind, cheap, images, other):
    torch._dynamo.reset()
    model = build(cheap, quality_grad=True)
    x, theirs = images[0].requires_grad_(), images[1].requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    run = compiled(model, kind)
    close(torch.autograd.grad(run(x).sum(), x)[0], expected)
    with held_to(REFUSED):
        in_steps(model, x, lambda: other(torch.enable_grad()(lambda: run(theirs))))
    close(torch.autograd.grad(run(x).sum(), x)[0], expected)


def test_many_threads_at_once(model, reference, images):
    """Two run it compiled, two plainly, two in parts, as the interpreter switches between them."""
    ours, theirs = images
    whole = torch.compile(model, **OPTIONS)
    model.layer2.compile(**OPTIONS)
    runs = [whole, model, lambda x: in_steps(model, x, lambda: None)] * 2
    pictures = [ours * (1 - 0.1 * i) for i in range(3)] + [theirs, theirs * 2, theirs * 3]
    with torch.no_grad():
        expected = [reference(x) for x in pictures]
        whole(ours)
        model(ours)

    @torch.no_grad()
    def work(i):
        torch.set_num_threads(1)
        for _ in range(12):
            close(runs[i](pictures[i]), expected[i])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
    finally:
        sys.setswitchinterval(interval)


def test_a_compiler_at_work_in_another_thread_is_none_of_ours(model, images):
    """Torch tells all threads of a compilation that is under way in one, here for the first half of a forward pass."""
    half_way, finished = threading.Event(), threading.Event()
    with torch.no_grad():
        expected = model(images[0])
    model.layer2.register_forward_pre_hook(lambda *_: half_way.set() or (finished.wait(60) and None))
    found = []

    def backend(graph, example):
        found.append(pool.submit(torch.no_grad()(model), images[0]))
        assert half_way.wait(60)
        return graph.forward

    with ThreadPoolExecutor(1) as pool:
        torch.compile(lambda x: x.sin() + 1, backend=aot_autograd(fw_compiler=backend))(torch.rand(3))
        finished.set()
        assert torch.equal(found[0].result(), expected)
