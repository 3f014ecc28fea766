"""Fixtures that point the real huggingface_hub at tests/hub_server.py: hub_server, hub, hub_env, hub_waits, publish.

What the oldest supported client (0.34.0, on requests) and a new one (2.4.0, on httpx) do differently is written down
here, for the tests to go by; versions between the two were not looked at.

ModelCard.validate and push_to_hub of 0.34 ask https://huggingface.co whatever HF_ENDPOINT says, and a token=False does
not keep hf_hub_download from sending the token of the environment: tests of it go without, or without HF_TOKEN.
"""

import contextlib
import importlib.util
import json
import os
import sys
import time
import types

import huggingface_hub
import pytest
import timm
from hub_server import HubServer
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

from quac_plugins.timm import _add_tag

NEW_CLIENT = int(huggingface_hub.__version__.split(".")[0]) >= 1

_SERVER_ERRORS = {500, 502, 503, 504}
# The statuses at which requests of a download or of create_commit are repeated, up to 5 times, after 1, 2, 4, 8, 8 s.
# HEAD: only if the file is not in the cache. POST: preupload and LFS' batch and verify; never /commit/, /validate-yaml
# and /repos/create. What asks for a repo's info is never repeated.
RETRIED = {
    "HEAD": {408, 429, *_SERVER_ERRORS} if NEW_CLIENT else {429},
    "GET": {408, 429} if NEW_CLIENT else {429},
    "POST": {408, 429, *_SERVER_ERRORS} if NEW_CLIENT else set(),
    "PUT": {408, 429, *_SERVER_ERRORS} if NEW_CLIENT else _SERVER_ERRORS,
}
# A file whose end is missing is asked for again from the last whole 10 MiB on: by the same call, a second later and up
# to 5 times without progress; or (old) by the next call, from the .incomplete file that the failed one left.
RESUMES_AT_ONCE = NEW_CLIENT
# What a file of another size leaves behind: nothing; or (old) such an .incomplete file, which the next call completes.
KEEPS_WRONG_BYTES = not NEW_CLIENT


def client_environment(hub, home, token="hf_good"):
    """The variables that send huggingface_hub to the test hub; home is where it keeps what it downloads."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # with hf_xet at hand, the newest client uploads LFS files to Xet's servers without asking the Hub
        "HF_HUB_DISABLE_XET": "1",
    }


def _foreign(name):
    """Whether a variable could send the client somewhere else, or keep it at home."""
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    return name.startswith(("HF_", "HUGGING")) or name == "TRANSFORMERS_OFFLINE" or name.upper() in proxies


def _put(new, old):
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "huggingface_hub"]:
        here = vars(module)
        here.update({name: new[name] for name in new if name in here and here[name] == old[name]})
    hf_api.api.endpoint = new.get("ENDPOINT", hf_api.api.endpoint)  # the instance behind create_repo, whoami, ...
    # connections outlive tests, and the old client decides when it opens them whether it is offline
    _http.close_session() if NEW_CLIENT else _http.reset_sessions()


@contextlib.contextmanager
def client_of_this_process():
    """Let the client that is imported here obey os.environ as it is now: it has read the variables at its import.

    The old client copies constants by name from module to module, so every copy is changed; and changed back at the
    end, also where a module was not imported before.
    """
    spec = importlib.util.spec_from_file_location("huggingface_hub._constants_of_a_test", constants.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    was = vars(constants)
    plain = (str, int, frozenset, type(None))
    new = {name: value for name, value in vars(fresh).items() if isinstance(value, plain) and name[:2] != "__"}
    new = {name: value for name, value in new.items() if name in was and value != was[name]}
    old = {name: was[name] for name in new}
    _put(new, old)
    try:
        yield
    finally:
        _put(old, new)


@pytest.fixture
def hub_server():
    """A started test hub that nothing points to."""
    with HubServer() as server:
        yield server
    assert not server.errors, "\n".join(server.errors)


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path):
    """The test hub, and huggingface_hub in this process on it: an empty cache, the token of "me", not offline."""
    for name in filter(_foreign, list(os.environ)):
        monkeypatch.delenv(name)
    for name, value in client_environment(hub_server, tmp_path / "hub_home").items():
        monkeypatch.setenv(name, value)
    with client_of_this_process():
        yield hub_server


@pytest.fixture
def hub_env(hub_server, tmp_path):
    """The whole environment of a subprocess on the test hub, with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not _foreign(name)}
    return kept | client_environment(hub_server, tmp_path / "hub_home_of_processes")


@pytest.fixture
def publish():
    """Let timm know weights as published ones, until the test ends."""
    kept = {}

    def add(*entries):
        for entry in entries:
            table = sys.modules[timm.model_entrypoint(entry.architecture).__module__].default_cfgs
            kept.setdefault(entry.architecture, (table, table[entry.architecture]))
            _add_tag(entry)

    yield add
    for name, (table, configs) in kept.items():
        table[name] = configs
        with pytest.warns(UserWarning, match=f"Overwriting {name} in registry"):
            timm.models.register_model(timm.model_entrypoint(name))


@pytest.fixture
def hub_waits(monkeypatch):
    """The seconds that the client wants to wait before it tries again: listed here, and not waited for."""
    waits = []
    clock = types.SimpleNamespace(**{**vars(time), "sleep": waits.append})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", clock)
    return waits


CATASTROPHE = "re:(([a-z0-9._])+)+!"


def changed(files, name, **values):
    """The files with another config: dotted names lead into it."""
    config = json.loads(files[name])
    for path, value in values.items():
        *parents, last = path.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    return {**files, name: json.dumps(config).encode()}
