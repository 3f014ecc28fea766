"""Push and pull through a server that speaks the Hub's protocol, with the real client."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from hub_fixtures import client_of_this_process
from huggingface_hub import constants
from safetensors.torch import save_file

import quac_plugins as quac
from quac_plugins.core.inject.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from quac_plugins.fit.confusion import Confusion
from quac_plugins.fit.report import FitReport
from quac_plugins.hub.fetch import fetch
from quac_plugins.hub.verify import sha256_of
from quac_plugins.registry import Entry, published

REPO = "me/fog-adapter"


def moved(model):
    """A model whose put-in parameters are not as they were created."""
    with torch.no_grad():
        for tensor in quac.adapter_state(model).values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand(tensor.shape))
    return model.eval()


@pytest.fixture
def host():
    """Builds the same host again and again."""
    base = timm.create_model("test_resnet", num_classes=5).eval()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def build(name="test_resnet", **kwargs):
        model = timm.create_model("test_resnet", num_classes=5).eval()
        model.load_state_dict(state)
        return model

    return build


def with_prior(host):
    return moved(quac.inject(host(), quac.PriorConfig(site="stages")))


def with_activations(host):
    return moved(quac.inject(host(), quac.QuACConfig(where="all", norm="layer")))


@pytest.mark.parametrize("put_in", [with_prior, with_activations])
def test_what_was_pushed_comes_back_the_same(put_in, host, hub, photographs):
    model, images = put_in(host), photographs(2, 64)
    pushed = quac.push(model, REPO, license="apache-2.0")
    assert pushed.url.startswith(hub.endpoint)
    assert hub.commits(REPO)[0] == pushed.commit
    files = hub.files(REPO)
    assert set(files) >= {CONFIG_NAME, WEIGHTS_NAME, "README.md"}
    assert {name: len(files[name]) for name in pushed.files} == {name: size for name, (size, _) in pushed.files.items()}
    again = quac.load_adapter(host(), REPO)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    pinned = quac.load_adapter(host(), REPO, revision=pushed.commit)
    assert all(torch.equal(tensor, quac.adapter_state(model)[n]) for n, tensor in quac.adapter_state(pinned).items())


def test_one_commit_holds_all(host, hub):
    quac.push(with_prior(host), REPO)
    before = hub.commits(REPO)
    quac.push(with_prior(host), REPO)
    after = hub.commits(REPO)
    assert len(after) == len(before) + 1
    assert set(hub.files(REPO, after[0])) == set(hub.files(REPO, after[1]))


def test_a_revision_is_what_it_was(host, hub, photographs):
    first, second, images = with_prior(host), with_prior(host), photographs(2, 64)
    commit = quac.push(first, REPO).commit
    quac.push(second, REPO)
    quac.push(first, REPO, revision="old")
    with torch.no_grad():
        for revision, model in ((commit, first), ("old", first), ("main", second), (None, second)):
            assert torch.equal(quac.load_adapter(host(), REPO, revision=revision)(images), model(images))
    with pytest.raises(FileNotFoundError, match=r"no revision 'nothing' at .*me/fog-adapter"):
        quac.load_adapter(host(), REPO, revision="nothing")


@pytest.mark.parametrize("name", ["test_resnet_qacon", "test_resnet_ddp", "test_vit_qacon_ddp"])
def test_a_whole_model_is_one_of_timm(name, hub, photographs):
    model = moved(timm.create_model(name, num_classes=7))
    quac.push(model, "me/whole", whole=True)
    again = timm.create_model("hf-hub:me/whole", pretrained=True).eval()
    images = photographs(2, 160)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    with pytest.raises(FileNotFoundError, match=r"whole model and no adapter: timm.create_model\('hf-hub:me/whole'"):
        quac.load_adapter(timm.create_model("test_resnet"), "me/whole")


def test_a_whole_model_needs_nothing_but_the_import(hub, hub_env, tmp_path):
    model = moved(timm.create_model("test_resnet_qacon", num_classes=3))
    quac.push(model, "me/whole", whole=True)
    torch.save((torch.ones(1, 3, 64, 64), model(torch.ones(1, 3, 64, 64)).detach()), tmp_path / "pair.pt")
    code = (
        "import sys, timm, torch, quac_plugins\n"
        "images, expected = torch.load(sys.argv[1])\n"
        "model = timm.create_model('hf-hub:me/whole', pretrained=True).eval()\n"
        "assert torch.equal(model(images), expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "pair.pt"], env=hub_env, check=True)


def test_a_dry_run_writes_what_would_be_sent_and_sends_nothing(host, hub, tmp_path):
    model = with_prior(host)
    pushed = quac.push(model, REPO, dry_run=tmp_path / "sent")
    assert pushed.commit is None
    assert not hub.requests
    assert {p.name: (p.stat().st_size, sha256_of(p)) for p in (tmp_path / "sent").iterdir()} == pushed.files
    assert quac.push(tmp_path / "sent", REPO).files.keys() == pushed.files.keys()
    quac.load_adapter(host(), tmp_path / "sent")


def test_the_cache_serves_offline(host, hub, monkeypatch):
    model = with_prior(host)
    quac.push(model, REPO)
    quac.load_adapter(host(), REPO)
    sent = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with client_of_this_process():
        quac.load_adapter(host(), REPO)
        assert len(hub.requests) == sent
        with pytest.raises(FileNotFoundError, match=r"'me/never' \(revision main\) is not in the cache .* HF_HUB_OFF"):
            quac.load_adapter(host(), "me/never")
        with pytest.raises(ConnectionError, match="nothing was sent to 'me/fog-adapter': HF_HUB_OFFLINE"):
            quac.push(model, REPO)


# -- what goes wrong


def untouched(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refused(model, error, message, **options):
    before = untouched(model)
    with pytest.raises(error, match=message):
        quac.load_adapter(model, REPO, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_swapped_bytes_are_noticed(host, hub):
    quac.push(with_prior(host), REPO)
    weights = bytearray(hub.files(REPO)[WEIGHTS_NAME])
    weights[-4:] = b"\0\0\0\0"
    hub.replace(REPO, WEIGHTS_NAME, bytes(weights), keep_etag=True)
    refused(host(), ValueError, "is damaged: its hash is .* and the Hub said .*fetch it again")


def test_a_swapped_config_is_noticed(host, hub):
    quac.push(with_prior(host), REPO)
    config = hub.files(REPO)[CONFIG_NAME]
    hub.replace(REPO, CONFIG_NAME, config.replace(b'"light"', b'"dense"'), keep_etag=True)
    refused(host(), ValueError, "adapter_config.json is damaged|has .* bytes|size")


def test_a_damaged_cache_is_noticed_and_mended_where_there_is_a_network(host, hub, photographs, monkeypatch):
    model, images = with_prior(host), photographs(2, 64)
    quac.push(model, REPO)
    blob = (fetch(REPO) / WEIGHTS_NAME).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 255
    blob.write_bytes(data)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with client_of_this_process():
        refused(host(), ValueError, r"is damaged: .*quac pull … --force")
    with torch.no_grad():
        assert torch.equal(quac.load_adapter(host(), REPO)(images), model(images))


def test_a_dropped_connection_goes_on(host, hub, hub_waits):
    model = with_prior(host)
    quac.push(model, REPO)
    hub.drop(path=WEIGHTS_NAME, after=5000, times=1)
    for attempt in range(2):  # older clients go on at the next call
        try:
            quac.load_adapter(again := host(), REPO)
            break
        except ConnectionError:
            assert attempt == 0
    assert all(torch.equal(t, quac.adapter_state(model)[n]) for n, t in quac.adapter_state(again).items())


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(suffix, host, hub, tmp_path):
    quac.push(with_prior(host), "me/other")
    files = hub.files("me/other")
    hub.add(REPO, {CONFIG_NAME: files[CONFIG_NAME], f"adapter_model.{suffix}": files[WEIGHTS_NAME]})
    refused(host(), ValueError, rf"adapter_model.{suffix} and no adapter_model.safetensors.*any code.*save_file\(")
    (tmp_path / CONFIG_NAME).write_bytes(files[CONFIG_NAME])
    (tmp_path / f"adapter_model.{suffix}").write_bytes(b"")
    with pytest.raises(ValueError, match="any code"):
        quac.load_adapter(host(), tmp_path)
    with pytest.raises(ValueError, match="any code"):
        quac.push(tmp_path, REPO)


def test_a_whole_model_as_a_pickle_is_refused(hub):
    model = timm.create_model("test_resnet_qacon", num_classes=3)
    quac.push(model, "me/other", whole=True)
    files = hub.files("me/other")
    hub.add("me/whole", {"config.json": files["config.json"], "pytorch_model.bin": files["model.safetensors"]})
    with pytest.raises(ValueError, match=r"pytorch_model.bin and no model.safetensors"):
        timm.create_model("hf-hub:me/whole", pretrained=True)


def test_a_repository_that_holds_something_else(host, hub):
    hub.add(REPO, {"notes.txt": b"nothing"})
    refused(host(), FileNotFoundError, "holds no adapter_config.json; it has notes.txt")


def test_who_may_not_read_is_told(host, hub):
    hub.add("you/hidden", {"a": b"b"}, private=True)
    hub.add("you/gated", {CONFIG_NAME: b"{}"}, gated=True)
    with pytest.raises(FileNotFoundError, match=r"no repository http.*you/hidden, or it is private.*hf auth login"):
        quac.load_adapter(host(), "you/hidden")
    with pytest.raises(PermissionError, match=r"you/gated is gated: ask for access"):
        quac.load_adapter(host(), "you/gated")
    with pytest.raises(FileNotFoundError, match=r"no repository http.*me/nothing"):
        quac.load_adapter(host(), "me/nothing")


def test_who_may_not_write_is_told_and_no_token_is_shown(host, hub, monkeypatch):
    with pytest.raises(PermissionError, match=r"refused to write 'you/adapter'.*token that may write") as caught:
        quac.push(with_prior(host), "you/adapter")
    assert "hf_good" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises((PermissionError, ConnectionError)) as caught:
        quac.push(with_prior(host), REPO, token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)


def test_a_hub_that_is_not_there(host, hub):
    quac.push(with_prior(host), REPO)
    hub.stop()
    with pytest.raises(FileNotFoundError, match=r"'me/never' .* is not in the cache .* could not be reached"):
        quac.load_adapter(host(), "me/never")
    with pytest.raises(ConnectionError, match=r"could not be reached, or broke off"):
        quac.push(with_prior(host), "me/other")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_busy(status, host, hub, hub_waits):
    quac.push(with_prior(host), REPO)
    hub.fail(method="HEAD", path=WEIGHTS_NAME, status=status, times=None)
    with pytest.raises((FileNotFoundError, ConnectionError), match="could not be re"):
        quac.load_adapter(host(), REPO)
    hub.heal()
    quac.load_adapter(host(), REPO)


def test_a_server_that_fails_leaves_no_half_commit(host, hub, hub_waits):
    hub.fail(method="POST", path=r"/commit/", status=500, times=99)
    with pytest.raises(ConnectionError, match=r"did not take 'me/fog-adapter' \(500\)"):
        quac.push(with_prior(host), REPO)
    assert WEIGHTS_NAME not in hub.files(REPO)


@pytest.mark.parametrize("name", ["x", "a/b/c", "../me/x", "me/..", "me/x y", "me/" + "x" * 200])
def test_names_that_are_none(name, host, tmp_path):
    with pytest.raises(ValueError, match=re.escape(name)):
        quac.push(with_prior(host), name, dry_run=tmp_path / "sent")
    assert not (tmp_path / "sent").exists()


def test_nothing_to_push(host, tmp_path):
    with pytest.raises(ValueError, match="holds no QuAC and no prior; inject first"):
        quac.push(host(), REPO, dry_run=tmp_path)
    with pytest.raises(ValueError, match="the prior is as it was created"):
        quac.push(quac.inject(host(), quac.PriorConfig()), REPO, dry_run=tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        quac.push(tmp_path / "none", REPO, dry_run=tmp_path)
    with pytest.raises(FileNotFoundError, match="holds neither an adapter"):
        quac.push(tmp_path, REPO, dry_run=tmp_path)
    broken = quac.save_adapter(with_prior(host), tmp_path / "broken")
    (broken / WEIGHTS_NAME).write_bytes((broken / WEIGHTS_NAME).read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        quac.push(broken, REPO, dry_run=tmp_path)


def test_pull_copies_what_there_is_and_no_more(host, hub, tmp_path):
    quac.push(with_prior(host), REPO)
    hub.add(REPO, {"../outside.txt": b"x", "evil.py": b"raise SystemExit"})
    folder = quac.pull(REPO, tmp_path / "mine")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]
    assert not (tmp_path / "outside.txt").exists()
    quac.load_adapter(host(), folder)
    assert not folder.is_symlink()


def _pull(environment, folder):
    os.environ.update(environment)
    code = f"import quac_plugins as q; q.pull({REPO!r}, {str(folder)!r})"
    return subprocess.run([sys.executable, "-c", code], env=environment).returncode


def test_two_processes_pull_at_once(host, hub, hub_env, tmp_path):
    quac.push(with_prior(host), REPO)
    hub.delay(path=WEIGHTS_NAME, seconds=0.3)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        codes = pool.starmap(_pull, [(hub_env, tmp_path / "one"), (hub_env, tmp_path / "two")])
    assert codes == [0, 0]
    assert sha256_of(tmp_path / "one" / WEIGHTS_NAME) == sha256_of(tmp_path / "two" / WEIGHTS_NAME)


def test_what_one_was_given_another_does_not_take_away(host, hub):
    quac.push(with_prior(host), REPO)
    hub.delay(path=WEIGHTS_NAME, seconds=0.5)

    def link(_):
        given = (fetch(REPO) / WEIGHTS_NAME).lstat()
        return given.st_ino, given.st_ctime_ns

    with ThreadPoolExecutor(2) as two:
        first, second = two.map(link, range(2))
    assert first == second


def test_files_are_of_one_commit_whatever_is_pushed_meanwhile(host, hub):
    commit = quac.push(with_prior(host), REPO).commit
    sent = hub.files(REPO)
    hub.delay(path=f"/resolve/{commit}/", seconds=0.3)

    def push(_):
        return hub.add(REPO, {CONFIG_NAME: b"{}", WEIGHTS_NAME: b"new"})

    with ThreadPoolExecutor(1) as other:
        later = other.submit(lambda: (time.sleep(0.15), push(None)))
        folder = fetch(REPO)
        later.result()
    assert folder.name == commit
    assert {name: (folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)} == {
        name: sent[name] for name in (CONFIG_NAME, WEIGHTS_NAME)
    }


def test_a_cache_that_may_only_be_read(host, hub):
    quac.push(with_prior(host), REPO)
    found = fetch(REPO)
    locks = Path(constants.HF_HUB_CACHE) / ".locks"
    shutil.rmtree(locks)
    locks.touch()  # where no lock can be written, whoever one is
    assert fetch(REPO) == found


# -- names


def test_ones_own_organization_stands_in_for_published_names(host, hub, monkeypatch, photographs, tmp_path):
    model, images = with_prior(host), photographs(2, 64)
    quac.push(model, "me/test_resnet_ddp.fog")
    save_file(
        {name: tensor.contiguous() for name, tensor in host().state_dict().items()}, tmp_path / "base.safetensors"
    )
    known = {"pretrained": True, "num_classes": 5}
    known["pretrained_cfg_overlay"] = {"file": str(tmp_path / "base.safetensors"), "num_classes": 5}
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("test_resnet_ddp.fog", **known)
    monkeypatch.setenv("QUAC_HUB", "me")
    with torch.no_grad():
        assert torch.equal(timm.create_model("test_resnet_ddp.fog", **known).eval()(images), model(images))
    with pytest.raises(FileNotFoundError, match=r"no repository http.*me/test_resnet_ddp.other"):
        timm.create_model("test_resnet_ddp.other", **known)
    sent = len(hub.requests)
    timm.create_model("test_resnet_ddp.r160_in1k", **known)  # a tag of the host's own weights
    assert len(hub.requests) == sent


def test_the_commands(host, hub, tmp_path):
    from typer.testing import CliRunner

    from quac_plugins.commands import app

    folder = str(quac.save_adapter(with_prior(host), tmp_path / "adapter"))

    def run(*arguments):
        return CliRunner().invoke(app, list(arguments))

    gate = Confusion(["identity", "fog"], {"clean": {"0": [9, 1]}, "fog": {"3": [4, 6]}})
    agreement = {"fog": {"before": 35.0, "after": 61.7, "n": 10}}
    FitReport("prior", ["layer1"], ["fog"], gate=gate, agreement=agreement).to_json(Path(folder) / "fit_report.json")
    dry = run("push", folder, REPO, "--dry-run", "--out", str(tmp_path / "dry"))
    assert dry.exit_code == 0, dry.output
    assert not hub.requests
    card = (tmp_path / "dry/README.md").read_text()
    rows = [
        "| degradation | severity | identity | fog |",
        "|---|---|---|---|",
        "| clean | 0 | 9 | 1 |",
        "| fog | 3 | 4 | 6 |",
    ]
    assert "\n".join(rows) in card
    assert "| fog | 35.0 | 61.7 | 10 |" in card
    sent = run("push", folder, REPO, "--license", "mit", "--private")
    assert sent.exit_code == 0, sent.output
    pulled = run("pull", REPO, "--out", str(tmp_path / "pulled"))
    assert pulled.exit_code == 0, pulled.output
    assert (tmp_path / "pulled" / WEIGHTS_NAME).read_bytes() == hub.files(REPO)[WEIGHTS_NAME]
    told = run("info", REPO, "--json")
    assert json.loads(told.output)["host"] == "test_resnet"
    missing = run("pull", "me/nothing")
    assert missing.exit_code == 2
    assert "no repository" in missing.output


def test_one_command_sends_all_models_of_the_package(hub):
    from typer.testing import CliRunner

    from quac_plugins.commands import app

    result = CliRunner().invoke(app, ["push", "--all", "me"])
    assert result.exit_code == 0, result.output
    embedded = [name for door in ("timm", "diffusers") for name in published(door)]
    assert [name for name in embedded if f"me/{name}" in result.output] == embedded
    folder = fetch("me/dla46_c_ddp.cifar10", files=("config.json", "model.safetensors"))
    assert sha256_of(folder / "model.safetensors") == published()["dla46_c_ddp.cifar10"].sha256


def test_a_revision_of_a_published_name(host, hub, monkeypatch, photographs):
    first, second, images = with_prior(host), with_prior(host), photographs(2, 64)
    name = "test_resnet_ddp.fog"
    commits = [quac.push(model, f"me/{name}").commit for model in (first, second)]
    weights = hub.files(f"me/{name}")[WEIGHTS_NAME]
    digest = hashlib.sha256(weights).hexdigest()
    entry = Entry(name, "adapter", digest, len(weights), "mit", repo=f"me/{name}", revision=commits[1])
    monkeypatch.setattr("quac_plugins.hub.published.published", lambda door="timm": {name: entry})
    with torch.no_grad():
        for revision, model in ((None, second), (commits[0], first)):
            assert torch.equal(quac.load_adapter(host(), name, revision=revision)(images), model(images))
