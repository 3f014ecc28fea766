import functools
import os
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that share cores wait for each other's threads; before torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: nothing waits for a network; the tests' own Hub lifts it

import numpy as np
import pytest
import torch
from cheap_quality import channel_statistics
from fit_fixtures import build, equal, folder, interrupt, photos, put_in, quick, snapshot  # noqa: F401
from hub_fixtures import hub, hub_env, hub_server, hub_waits, publish  # noqa: F401
from skimage import data

NAMES = ("astronaut", "coffee", "chelsea", "rocket")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo():
    """Nothing was compiled before: what was compiled too often runs eagerly from then on."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def cheap():
    return channel_statistics


@functools.cache
def picture_of(name):
    return getattr(data, name)()[..., :3]


@pytest.fixture(scope="session")
def photographs():
    """Real photographs, cropped square and scaled: photographs(4, 64) is a float tensor (4, 3, 64, 64) in [0, 1]."""

    def load(count=4, size=64):
        images = []
        for i in range(count):
            picture = picture_of(NAMES[i % len(NAMES)])
            side = min(picture.shape[:2]) - 16 * (i // len(NAMES))  # other crops when asked for more
            square = torch.from_numpy(np.ascontiguousarray(picture[:side, -side:])).permute(2, 0, 1)[None].float() / 255
            images.append(torch.nn.functional.interpolate(square, size=(size, size), mode="area"))
        return torch.cat(images)

    return load


@pytest.fixture
def normalized(photographs):
    """The photographs as a host with ImageNet's mean and std gets them."""
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return lambda count=4, size=64: (photographs(count, size) - mean) / std


@pytest.fixture
def moved():
    """Let what was put in differ from its start, so that q matters."""

    def move(model):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in (".fc3.", ".p1", ".p2", ".fc1.")):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return move


@pytest.fixture
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def group_of_one():
    """A process group of this process alone, for the wrappers that want one; test_timm.py has one of two."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
