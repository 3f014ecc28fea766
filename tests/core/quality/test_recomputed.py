"""q under activation checkpointing: what is recomputed has the q of its own pass, or is refused."""

import pytest
import torch
from outcomes import REFUSED, held_to
from passes import (
    ONE_PASS_ALONE,
    build,
    cascade,
    chain,
    close,
    forward_between,
    gradients,
    image_of,
    one_forward,
    two_forwards,
)
from timm.layers import set_reentrant_ckpt
from torch.utils.checkpoint import checkpoint

from quac_plugins import use_q
from quac_plugins.core.quality.padding import note_sizes


@pytest.fixture
def model(cheap):
    return build(cheap).eval()


@pytest.fixture
def reentrant():
    set_reentrant_ckpt(True)
    yield
    set_reentrant_ckpt(False)


@pytest.mark.parametrize("passes", [one_forward, two_forwards, forward_between, cascade])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_gradients_are_those_without_checkpointing(passes, name, cheap, photographs):
    model = build(cheap, name, where="all").train()
    loss = passes(photographs)
    expected = gradients(model, loss)
    model.set_grad_checkpointing(True)
    for _ in range(2):
        close(gradients(model, loss), expected)


@pytest.mark.usefixtures("reentrant")
@pytest.mark.parametrize(("passes", "outcome"), ONE_PASS_ALONE)
def test_reentrant_checkpointing(passes, outcome, cheap, photographs):
    model = build(cheap).train()
    loss, one = passes(photographs), one_forward(photographs)
    expected, expected_one = gradients(model, loss), gradients(model, one)
    model.set_grad_checkpointing(True)
    with held_to(outcome):
        close(gradients(model, loss), expected)
    for _ in range(3):  # one forward before its backward is always right, also after a refusal
        close(gradients(model, one), expected_one)
    model(photographs(2, 48))  # and after a forward that nobody differentiates
    close(gradients(model, one), expected_one)


@pytest.mark.parametrize("passes", [one_forward, two_forwards, forward_between])
@pytest.mark.parametrize(
    ("name", "kind"),
    # reentrant checkpoints behind resnet's frozen stem have no gradient at all, with or without QuAC
    [("test_resnet", False), ("test_vit", False), ("test_vit", True)],
)
def test_frozen_stem_with_checkpointing_serves_one_pass_and_refuses_two(passes, name, kind, cheap, photographs):
    model = build(cheap, name, where="all", **({"img_size": 48} if name == "test_vit" else {})).train()
    frozen = [model.conv1, model.bn1, model.act1] if name == "test_resnet" else [model.patch_embed]
    for module in frozen:
        module.requires_grad_(False)
    loss, one = passes(photographs), one_forward(photographs)
    expected, expected_one = gradients(model, loss), gradients(model, one)
    set_reentrant_ckpt(kind)
    try:
        model.set_grad_checkpointing(True)
        for _ in range(3):
            close(gradients(model, one), expected_one)
        if passes is not one_forward:
            with held_to(REFUSED):
                close(gradients(model, loss), expected)
    finally:
        set_reentrant_ckpt(False)


@pytest.mark.parametrize("kind", [False, True])
@pytest.mark.parametrize("passes", [one_forward, two_forwards, cascade])
def test_the_whole_model_checkpointed(kind, passes, cheap, photographs):
    model = build(cheap).train()
    loss = passes(photographs)
    expected = gradients(model, loss)

    def whole(model):
        return loss(lambda x: checkpoint(model, x if x.requires_grad else x.requires_grad_(), use_reentrant=kind))

    for _ in range(2):
        close(gradients(model, whole), expected)
    close(gradients(model, lambda m: one_forward(photographs)(m)), gradients(model, one_forward(photographs)))


def test_second_stage_of_a_cascade_checkpointed_as_a_whole(cheap, photographs):
    model = build(cheap).train()
    expected = gradients(model, cascade(photographs))

    def loss(model):
        return checkpoint(model, image_of(model(photographs(2, 48))), use_reentrant=False).square().mean()

    close(gradients(model, loss), expected)


def test_image_that_comes_from_an_earlier_pass_and_is_seen_again_late(cheap, photographs):
    model = chain(cheap)

    def loss(model):
        return model(model(photographs(2, 32))).square().mean()

    expected = gradients(model, loss)
    model.checkpointed = True
    close(gradients(model, loss), expected)


@pytest.mark.parametrize("kind", [False, True])
def test_given_quality_with_the_whole_model_checkpointed(kind, cheap, photographs):
    model = build(cheap).train()
    images, q = photographs(2, 48).requires_grad_(), torch.rand(2, 6) * 5

    def loss(model, run):
        with use_q(model, q):
            return run(images).square().mean()

    expected = gradients(model, lambda m: loss(m, m))
    assert not torch.allclose(expected["conv1.0.weight"], gradients(model, one_forward(photographs))["conv1.0.weight"])

    def run(x):
        return checkpoint(model, x, use_reentrant=kind)

    close(gradients(model, lambda m: loss(m, run)), expected)
    with use_q(model, q):  # backward inside is always right
        close(gradients(model, lambda m: run(images).square().mean()), expected)


def test_given_quality_with_checkpointed_stages(cheap, photographs):
    model = build(cheap).train()

    def loss(model):
        total = 0
        for value in (0.0, 3.0):
            with use_q(model, torch.full((2, 6), value)):
                total = total + model(photographs(2, 48)).square().mean()
        return total

    expected = gradients(model, loss)
    model.set_grad_checkpointing(True)
    close(gradients(model, loss), expected)


@pytest.mark.parametrize("kind", [False, True])
def test_padded_images_with_the_whole_model_checkpointed(kind, model, photographs, monkeypatch):
    """Reentrant checkpointing recomputes from a detached image, which knows nothing of the padding."""
    monkeypatch.setenv("QUAC_KERNELS", "plain")  # it begins without gradients, where kernels sum in another order
    found = []
    for wrapped in (False, True):
        images = photographs(2, 64).clone().requires_grad_()
        note_sizes(images, [(64, 64), (40, 48)])
        output = checkpoint(model, images, use_reentrant=kind) if wrapped else model(images)
        output.square().sum().backward()
        found.append(images.grad)
    assert torch.equal(*found)
