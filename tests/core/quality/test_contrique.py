"""CONTRIQUE's encoder against torchvision's ResNet-50, from checkpoints in the official format."""

import copy
import gc
import io
import pickle
import shutil
import weakref

import pytest
import torch
from safetensors.torch import save_file
from skimage import data
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet50

from quac_plugins.core.quality.contrique import Contrique, contrique, contrique_encoder
from quac_plugins.core.quality.registry import resolve_quality


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    encoder = nn.Sequential(*list(resnet50(weights=None).children())[:-2])
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: statistics of its own
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return encoder.eval()


@pytest.fixture(scope="module")
def state(reference):
    projector = nn.Sequential(nn.Linear(2048, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8))
    model = nn.ModuleDict({"encoder": reference, "projector": projector})
    return model.state_dict()


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("contrique") / "CONTRIQUE_checkpoint25.tar"
    torch.save(state, path)
    return path


@pytest.fixture(autouse=True)
def without_environment(monkeypatch):
    monkeypatch.delenv("QUAC_CONTRIQUE", raising=False)


@pytest.fixture(scope="module")
def images():
    crops = [torch.tensor(getattr(data, name)()[100:196, 100:228]) for name in ("astronaut", "coffee")]
    return torch.stack(crops).permute(0, 3, 1, 2).float() / 255


def test_a_checkpoint_is_one_function_while_it_is_in_use(checkpoint, tmp_path, monkeypatch):
    found = resolve_quality(f"contrique:{checkpoint}")
    again = pickle.loads(pickle.dumps(resolve_quality(f"contrique:{checkpoint}")))
    assert found == resolve_quality(f"contrique:{checkpoint}") == again == copy.deepcopy(found)
    assert again.function is found.function
    monkeypatch.setenv("QUAC_CONTRIQUE", str(checkpoint))
    named = resolve_quality("contrique")
    assert named == resolve_quality("contrique") != found
    other = shutil.copy(checkpoint, tmp_path / "other.tar")
    monkeypatch.setenv("QUAC_CONTRIQUE", str(other))
    assert resolve_quality("contrique") != named  # which may hold other weights
    alive = weakref.ref(found.function)
    del found, again
    gc.collect()
    assert alive() is None


def expected_of(reference, images):
    with torch.no_grad():
        return nn.functional.adaptive_avg_pool2d(reference(images), 1).flatten(1)


def test_equals_torchvision(checkpoint, reference, images):
    found = resolve_quality(f"contrique:{checkpoint}")
    assert (found.name, found.channels) == (f"contrique:{checkpoint}", 2048)
    q = found(images)
    assert q.shape == (2, 2048)
    # over the largest of fifty layers' sums; kernels round differently from version to version, and by batch
    expected = expected_of(reference, images)
    close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
    torch.testing.assert_close(q, expected, **close)
    torch.testing.assert_close(found(images[1:]), q[1:], **close)


@pytest.mark.parametrize("form", ["module prefix", "under state_dict", "no counters", "safetensors"])
def test_forms_of_the_checkpoint(form, state, reference, tmp_path, images):
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.tar")
    if form == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        if form == "module prefix":
            state = {f"module.{k}": v for k, v in state.items()}
        elif form == "under state_dict":
            state = {"state_dict": state, "epoch": 25}
        elif form == "no counters":
            state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        torch.save(state, path)
    q = resolve_quality(f"contrique:{path}")(images[:1, :, :40, :40])
    torch.testing.assert_close(q, expected_of(reference, images[:1, :, :40, :40]), rtol=1e-4, atol=1e-5)


def test_environment_gives_the_path(checkpoint, monkeypatch):
    later = contrique()  # built before there is a path, called after
    monkeypatch.setenv("QUAC_CONTRIQUE", str(checkpoint))
    assert later(torch.rand(1, 3, 32, 32)).shape == (1, 2048)
    assert resolve_quality("contrique").name == "contrique"
    monkeypatch.setenv("QUAC_CONTRIQUE", "/nowhere/contrique.tar")
    with pytest.raises(FileNotFoundError, match=r"/nowhere/contrique\.tar"):
        resolve_quality("contrique")


def test_without_checkpoint_it_is_built_but_not_called():
    found = resolve_quality("contrique")
    assert found.channels == 2048
    with pytest.raises(FileNotFoundError) as error:
        found(torch.rand(1, 3, 32, 32))
    for part in ("CONTRIQUE_checkpoint25.tar", "pavancm/CONTRIQUE", "contrique:/path", "QUAC_CONTRIQUE", "brisque"):
        assert part in str(error.value)


def test_path_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match=r"/nowhere/c\.tar.*CONTRIQUE_checkpoint25"):
        resolve_quality("contrique:/nowhere/c.tar")


def test_wrong_checkpoints(state, tmp_path):
    def saved(value):
        torch.save(value, tmp_path / "wrong.tar")
        return tmp_path / "wrong.tar"

    with pytest.raises(ValueError, match=r"1 missing \(encoder\.0\.weight\); 1 unexpected \(encoder\.9\.weight\)"):
        Contrique(str(saved({k.replace("encoder.0.", "encoder.9."): v for k, v in state.items()}))).load()
    with pytest.raises(ValueError, match=r"missing \(encoder\.0\.weight, encoder\.1\.weight.*…\)"):
        Contrique(str(saved({"conv1.weight": torch.zeros(1)}))).load()
    with pytest.raises(
        ValueError, match=r"1 of another shape \(encoder\.0\.weight \(1,\) instead of \(64, 3, 7, 7\)\)"
    ):
        Contrique(str(saved({**state, "encoder.0.weight": torch.zeros(1)}))).load()
    with pytest.raises(ValueError, match="of another shape"):
        Contrique(str(saved({**state, "encoder.0.weight": "text"}))).load()
    with pytest.raises(ValueError, match="list"):
        Contrique(str(saved([1, 2]))).load()
    (tmp_path / "text.tar").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.tar"):
        Contrique(str(tmp_path / "text.tar")).load()


def test_never_runs_code_of_a_checkpoint(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was run"), "w"))

    torch.save({"encoder.0.weight": Evil()}, tmp_path / "evil.tar")
    with pytest.raises(ValueError, match=r"evil\.tar"):
        Contrique(str(tmp_path / "evil.tar")).load()
    assert not (tmp_path / "was run").exists()


def test_stays_out_of_the_network(checkpoint):
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.quality = resolve_quality(f"contrique:{checkpoint}").function

    host = Host().train().half()
    assert not list(host.parameters())
    assert not host.state_dict()
    encoder = host.quality._encoders[torch.device("cpu")]
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    assert copy.deepcopy(host).quality is host.quality


def test_pickles_by_path(checkpoint, images):
    found = resolve_quality(f"contrique:{checkpoint}")
    dump = pickle.dumps(found)
    assert len(dump) < 2000
    small = images[:, :, :33, :33]
    assert torch.equal(pickle.loads(dump)(small), found(small))
    buffer = io.BytesIO()
    torch.save(found.function, buffer)
    assert buffer.tell() < 4000


def test_computes_in_float32(checkpoint, images):
    found, small = contrique(str(checkpoint)), images[:, :, :48, :48]
    expected = found(small)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(found(small), expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert found(small.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5), (31, 7)])
def test_tiny_images_are_finite(checkpoint, size):
    q = contrique(str(checkpoint))(torch.rand(2, 3, *size))
    assert q.shape == (2, 2048)
    assert q.isfinite().all()


def test_shapes_without_data(checkpoint):
    for function in (Contrique(), contrique(str(checkpoint)).function):
        assert function(torch.empty(3, 3, 64, 64, device="meta")).shape == (3, 2048)
        with FakeTensorMode():
            assert function(torch.empty(3, 3, 64, 64)).shape == (3, 2048)


def test_compiles_whole_once_loaded(checkpoint, images):
    torch._dynamo.reset()
    function, small = contrique(str(checkpoint)).function, images[:, :, :32, :32]
    with torch.no_grad():
        compiled = torch.compile(lambda x: function(x), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(small), function(small))


def test_gradient_reaches_the_images_if_asked(checkpoint):
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not resolve_quality(f"contrique:{checkpoint}")(images).requires_grad
    resolve_quality(f"contrique:{checkpoint}", needs_grad=True)(images).sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().max() > 0


def test_wrong_images(checkpoint):
    found = contrique(str(checkpoint))
    with pytest.raises(TypeError, match="uint8"):
        found(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\)"):
        found(torch.zeros(1, 1, 8, 8))


def test_loading_leaves_the_random_state(checkpoint):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    Contrique(str(checkpoint)).load()
    assert torch.equal(torch.rand(3), expected)


def test_encoder_has_the_names_of_torchvision(reference):
    ours, theirs = contrique_encoder().state_dict(), reference.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
