"""How far it is from a host's call of a site to the kernels, in frames of Python's stack."""

import traceback

import timm
import torch

from quac_plugins.core.kernels import operator


def test_a_site_is_few_frames_from_its_kernels(monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "native")
    kernels, ways = operator.kernels_of("cpu", torch.float32), {}
    assert kernels is not None  # without a compiler of C++ nothing is shown here

    def noted(name):
        def run(*args):
            stack = [frame.name for frame in traceback.extract_stack()[:-1]]
            ways.setdefault(name, []).append(stack[::-1].index("_wrapped_call_impl") + 1)
            return getattr(kernels, name)(*args)

        return run

    monkeypatch.setattr(operator, "kernels_of", lambda *_: type(kernels)(noted("run"), noted("means")))
    model = timm.create_model("test_resnet_qacon").eval()
    with torch.inference_mode():
        model(torch.rand(1, 3, 64, 64))
    assert len(ways["run"]) == len(ways["means"]) > 0
    assert max(*ways["run"], *ways["means"]) < 10
