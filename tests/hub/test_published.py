"""Published models by name: the registry's entries, embedded files and their hashes."""

import contextlib
import copy
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from typer.testing import CliRunner

import quac_plugins as quac
from quac_plugins.commands import app
from quac_plugins.degradations import corrupt
from quac_plugins.evaluate import evaluate
from quac_plugins.evaluate.npz import unpack
from quac_plugins.evaluate.predict import predict
from quac_plugins.hub.check import check_registry
from quac_plugins.hub.verify import sha256_of
from quac_plugins.registry import Entry, published, read_entries, write_entry

VALID = {"kind": '"model"', "sha256": f'"{"a" * 64}"', "size": "12", "license": '"mit"'}


def toml(**changes):
    lines = [f"{key} = {value}" for key, value in {**VALID, **changes}.items() if value is not None]
    return '["test_resnet_qacon.tiny"]\n' + "\n".join(lines) + "\n"


@pytest.fixture
def registry(tmp_path, monkeypatch, publish):
    """Entries and folders of a registry of its own, under the real names' code."""
    entries = {}
    for module in ("published", "check"):
        monkeypatch.setattr(
            f"quac_plugins.hub.{module}.published", lambda door="timm": entries if door == "timm" else {}
        )
    monkeypatch.setattr("quac_plugins.registry.data_folder", lambda name: tmp_path / name)
    monkeypatch.setattr("quac_plugins.hub.check.data_folder", lambda name: tmp_path / name)
    (tmp_path / "hub").mkdir()

    def add(name, kind, weights, **values):
        file = tmp_path / "hub" / name / weights
        known = {"sha256": sha256_of(file), "size": file.stat().st_size, "license": "mit"}
        entries[name] = Entry(name, kind, **known, **values)
        publish(entries[name])
        return entries[name]

    return tmp_path / "hub", entries, add


def moved(model):
    with torch.no_grad():
        for tensor in quac.adapter_state(model).values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand(tensor.shape))
    return model.eval()


@pytest.fixture
def whole(registry):
    """A published whole model of ten classes and its trained original."""
    hub, _, add = registry
    normalization = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}  # q depends on it
    options = {"num_classes": 10, "where": "all", "norm": "layer", "pretrained_cfg_overlay": normalization}
    model = moved(timm.create_model("test_resnet_qacon", **options))
    quac.push(model, "me/tiny", whole=True, dry_run=hub / "test_resnet_qacon.tiny")
    entry = add(
        "test_resnet_qacon.tiny", "model", "model.safetensors",
        input={"num_classes": 10, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "input_size": [3, 64, 64]},
        model_args={"where": "all", "norm": "layer"}, metrics={"top1": 12.5},
    )  # fmt: skip
    return entry, model


@pytest.fixture
def over_a_host(registry):
    """A published prior over a published host without anything of ours."""
    hub, _, add = registry
    host = timm.create_model("test_resnet", num_classes=10).eval()
    (hub / "test_resnet.tiny").mkdir()
    save_file({n: t.contiguous() for n, t in host.state_dict().items()}, hub / "test_resnet.tiny/model.safetensors")
    add("test_resnet.tiny", "model", "model.safetensors", input={"num_classes": 10, "classifier": "fc"})
    model = moved(quac.inject(host, quac.PriorConfig(site="stages")))
    quac.push(model, "me/tiny", dry_run=hub / "test_resnet_ddp.tiny")
    entry = add("test_resnet_ddp.tiny", "adapter", "adapter_model.safetensors", base="tiny")
    return entry, model


def test_a_whole_model_by_its_name(whole, photographs):
    entry, model = whole
    again = timm.create_model(entry.name, pretrained=True).eval()
    images = photographs(2, 64)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    cfg = timm.data.resolve_model_data_config(again)
    assert (cfg["mean"], cfg["input_size"]) == ((0.5, 0.5, 0.5), (3, 64, 64))
    assert entry.name in timm.list_models("*_qacon*", pretrained=True)
    assert timm.get_pretrained_cfg(entry.name).num_classes == 10
    fresh = timm.create_model(entry.name).eval()  # its shape, other weights
    assert fresh.num_classes == 10
    with torch.no_grad():
        assert not torch.equal(fresh(images), model(images))
    assert timm.create_model(entry.name, pretrained=True, num_classes=3)(images).shape == (2, 3)


def test_a_folder_to_embed_is_made_under_the_name_itself(registry, photographs):
    hub, _, add = registry
    model = moved(timm.create_model("test_resnet_qacon", num_classes=10, init="paper"))
    model = model.to(memory_format=torch.channels_last)
    name = "test_resnet_qacon.paper"
    quac.push(model, name, whole=True, dry_run=hub / name)
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (model.conv1[0].weight,))
    assert f'timm.create_model("{name}", pretrained=True)' in (hub / name / "README.md").read_text()
    add(name, "model", "model.safetensors", input={"num_classes": 10}, model_args={"init": "paper"})
    images = photographs(2, 64)
    with torch.no_grad():
        assert torch.allclose(timm.create_model(name, pretrained=True).eval()(images), model(images), atol=1e-5)
    with pytest.raises(ValueError, match="repo_id must be 'org/name'"):
        quac.push(model, name, whole=True)  # the Hub has no such names


def test_an_adapter_over_a_published_host(over_a_host, photographs):
    entry, model = over_a_host
    images = photographs(2, 64)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(timm.create_model(entry.name, pretrained=True).eval()(images), expected)
        plain = timm.create_model("test_resnet.tiny", pretrained=True).eval()
        assert torch.equal(quac.load_adapter(plain, entry.name)(images), expected)
        quac.remove(model)
        assert torch.equal(timm.create_model("test_resnet.tiny", pretrained=True).eval()(images), model(images))


def test_weights_under_a_name_of_timms_own(registry, photographs):
    """A host without anything of ours: timm itself builds it from its config, and reads it."""
    hub, entries, add = registry
    host = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    quac.push(host, "test_resnet.grey", whole=True, dry_run=hub / "test_resnet.grey")
    entry = add(
        "test_resnet.grey", "model", "model.safetensors", input={"num_classes": 10, "input_size": [1, 64, 64]},
        model_args={"in_chans": 1},
    )  # fmt: skip
    images = photographs(2, 64)[:, :1]
    with torch.no_grad():
        assert torch.equal(timm.create_model(entry.name, pretrained=True).eval()(images), host(images))
        assert timm.create_model(entry.name)(images).shape == (2, 10)
        assert timm.create_model("test_resnet", num_classes=3)(photographs(1, 64)).shape == (1, 3)
    file = hub / entry.name / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    entries["test_resnet.away"] = replace(entry, name="test_resnet.away", repo="me/away", revision="a" * 40)
    entries["test_resnet.act"] = replace(entry, name="test_resnet.act", model_args={"act_layer": "gelu"})
    problems = dict(check_registry())
    assert "SHA-256" in problems[entry.name][0]
    assert "compares no hash and takes repo and revision from no registry" in problems["test_resnet.away"][0]
    assert "takes model_args act_layer from no registry" in problems["test_resnet.act"][0]


@pytest.mark.parametrize("how", ["swapped", "cut", "missing"])
def test_an_embedded_file_that_is_another_is_refused(how, whole, over_a_host, registry):
    hub, _, _ = registry
    for entry, weights in ((whole[0], "model.safetensors"), (over_a_host[0], "adapter_model.safetensors")):
        file = hub / entry.name / weights
        data = file.read_bytes()
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes(data[:-4] + b"abcd" if how == "swapped" else data[:-4])
        message = {"swapped": "SHA-256", "cut": "bytes, but the registry says", "missing": "is missing; reinstall"}[how]
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            timm.create_model(entry.name, pretrained=True)
        assert any(re.search(message, problem) for problem in dict(check_registry())[entry.name])


def test_a_whole_model_is_no_adapter(whole):
    with pytest.raises(FileNotFoundError, match=r"whole model and no adapter: timm.create_model"):
        quac.load_adapter(timm.create_model("test_resnet"), whole[0].name)


def test_the_check_finds_what_is_wrong(whole, registry):
    hub, entries, _ = registry
    entry, _ = whole
    folder = hub / entry.name
    assert dict(check_registry()) == {entry.name: [f"hub/{entry.name}/metrics.json is missing"]}
    clean = {"top1": 12.5, "top5": 50.0, "n": 8}
    (folder / "metrics.json").write_text(json.dumps([{"model": entry.name, "clean": clean, "corruptions": {}}]))
    assert dict(check_registry()) == {entry.name: []}
    ran = CliRunner().invoke(app, ["registry", "check"])
    assert (ran.exit_code, ran.output) == (0, f"{entry.name}: ok\n")
    entries[entry.name] = replace(entry, metrics={"top1": 99.0})
    assert dict(check_registry()) == {entry.name: ["top1 is 99.0 in the registry, 12.50 in metrics.json"]}
    shutil.copytree(folder, hub / "test_resnet_qacon.forgotten")
    ran = CliRunner().invoke(app, ["registry", "check"])
    assert ran.exit_code == 2
    assert "test_resnet_qacon.forgotten: hub/ holds it, and no entry of the registry names it" in ran.output


def test_the_check_measures_again(whole, registry, tmp_path):
    _, entries, _ = registry
    entry, _ = whole
    for index, name in enumerate(("astronaut", "chelsea", "coffee", "rocket")):
        (tmp_path / "data" / f"class {index}").mkdir(parents=True)
        Image.fromarray(getattr(data, name)()).resize((64, 64)).save(tmp_path / f"data/class {index}/image.png")
    found = []
    for value in (0.0, 25.0, 50.0, 75.0, 100.0):
        entries[entry.name] = replace(entry, metrics={"val_top1": value})
        problems = dict(check_registry(data=tmp_path / "data"))[entry.name]
        found.append(any("top-1 is" in problem for problem in problems))
    assert sorted(found) == [False, True, True, True, True]


def test_the_check_measures_on_a_packed_set(whole, registry, tmp_path):
    _, entries, _ = registry
    entry, model = whole
    files, labels = [], []
    for index, name in enumerate(("astronaut", "chelsea", "coffee", "rocket")):
        buffer = io.BytesIO()
        Image.fromarray(getattr(data, name)()).resize((64, 64)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
        labels.append(index)
    jpeg, offsets = np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])
    classes = np.array([f"class {index}" for index in range(10)])
    np.savez(tmp_path / "val.npz", jpeg=jpeg, offsets=offsets, labels=np.array(labels), classes=classes)
    measured = evaluate(model, unpack(tmp_path / "val.npz", tmp_path / "pictures")).clean["top1"]
    for value, wrong in ((measured, False), (measured + 0.06, True)):
        entries[entry.name] = replace(entry, metrics={"val_top1": value})
        problems = dict(check_registry(data=tmp_path))[entry.name]
        assert any("on val.npz, the entry says" in problem for problem in problems) is wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": '"other"'}, "kind must be 'adapter' or 'model', got 'other'"),
        ({"kind": None}, "missing kind; an entry has kind, sha256"),
        ({"hash": '"x"'}, "unknown hash"),
        ({"sha256": '"abc"'}, "sha256 must be 64 hexadecimal digits"),
        ({"size": '"big"'}, "size must be of type int, got 'big'"),
        ({"size": "0"}, "size must be in bytes"),
        ({"repo": '"me/x"'}, "repo and revision go together"),
        (
            {"repo": '"me/x"', "revision": '"main"'},
            "revision must be a commit of 40 hexadecimal digits, which cannot move, got 'main'",
        ),
        ({"base": '"in1k"'}, "base is for adapters"),
        ({"input": "{colour = 3}"}, "input knows mean, std"),
        ({"metrics": '{top1 = "good"}'}, "metrics must be numbers"),
        ({"license": "3"}, "license must be of type str"),
    ],
)
def test_an_entry_is_checked_field_by_field(changes, message, tmp_path):
    path = tmp_path / "timm.toml"
    path.write_text(toml())
    assert list(read_entries(path)) == ["test_resnet_qacon.tiny"]
    path.write_text(toml(**changes))
    with pytest.raises(ValueError, match=rf'timm.toml: \["test_resnet_qacon.tiny"\]: {message}'):
        read_entries(path)


def test_a_registry_that_is_no_toml_or_names_nothing(tmp_path):
    path = tmp_path / "timm.toml"
    path.write_text("[")
    with pytest.raises(ValueError, match=r"timm.toml is no TOML"):
        read_entries(path)
    path.write_text('["../x"]\n')
    with pytest.raises(ValueError, match=r"is named NAME.TAG"):
        read_entries(path)


def test_the_packages_own_registry_is_true():
    assert all(not problems for _, problems in check_registry())
    assert all(entry.name == name for name, entry in published().items())


@pytest.mark.parametrize("name", [entry.name for entry in published().values() if entry.repo is None])
def test_what_is_embedded_loads_with_no_network_and_predicts(name, monkeypatch, photographs):
    """By the name alone, through timm's own factory; q of the pictures decides where the network reads it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    entry = published()[name]
    at_hand = pytest.warns(UserWarning, match="not reachable") if entry.kind == "adapter" else contextlib.nullcontext()
    with at_hand:  # an adapter's host has its weights from a package then
        model = timm.create_model(name, pretrained=True).eval()
    cfg = model.pretrained_cfg
    assert model.num_classes == entry.input.get("num_classes", 1000)
    assert entry.size <= 4_000_000
    assert entry.kind == "adapter" or sum(p.numel() for p in model.parameters()) * 2 <= entry.size
    assert {key: list(cfg[key]) for key in entry.input if key in ("mean", "std")} == {
        key: value for key, value in entry.input.items() if key in ("mean", "std")
    }
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = photographs(4, cfg["input_size"][-1])
    with torch.no_grad():
        logits = model((images - mean) / std)
        torch.testing.assert_close(model((images[:1] - mean) / std), logits[:1])
    assert logits.shape == (4, model.num_classes)
    assert len(set(logits.argmax(dim=1).tolist())) > 1


def test_the_weather_adapter_sees_what_its_host_does_not(monkeypatch):
    """The README's first claim, on a cup of coffee."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.warns(UserWarning, match="not reachable"):
        model = timm.create_model("tf_efficientnet_lite0_ddp.in1k_weather", pretrained=True).eval()
    cup = Image.fromarray(data.coffee()[:, 100:500]).resize((224, 224), Image.Resampling.BICUBIC)
    host = quac.remove(copy.deepcopy(model))

    def first(picture):
        said = predict(model, picture, host=host)
        return said.host[0][0], said.classes[0][0]

    assert first(cup) == ("espresso", "espresso")
    for kind in ("contrast", "elastic_transform", "glass_blur"):
        without, with_margins = first(Image.fromarray(corrupt(np.asarray(cup), kind, 4, 0)))
        assert without != "espresso" == with_margins, kind


def test_an_entry_is_written_in_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "timm.toml"
    path.write_text("# what it is\n\n" + toml() + "\n" + toml().replace(".tiny", ".other"))
    values = {"kind": "model", "sha256": "b" * 64, "size": 7, "license": "mit", "base": None, "metrics": {"top1": 1.5}}
    write_entry(path, "test_resnet_qacon.tiny", {**values, "input": {"mean": [0.5] * 3}, "model_args": {}})
    assert path.read_text().startswith("# what it is\n")
    entries = read_entries(path)
    assert list(entries) == ["test_resnet_qacon.other", "test_resnet_qacon.tiny"]
    written = entries["test_resnet_qacon.tiny"]
    assert (written.size, written.metrics, written.input) == (7, {"top1": 1.5}, {"mean": [0.5] * 3})
    assert [file.name for file in tmp_path.iterdir()] == ["timm.toml"]
