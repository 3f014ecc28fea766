"""What a repository says can be refused, and no more: it opens nothing, hangs nothing, and is compared before use."""

import json
import time

import pytest
import timm
import torch
from hub_fixtures import CATASTROPHE, changed
from huggingface_hub import file_download

import quac_plugins as quac
from quac_plugins.core.inject.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from quac_plugins.hub.fetch import fetch

REPO, WHOLE = "me/adapter", "me/whole"


def host():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The files of an adapter with both activations and a prior."""
    torch.manual_seed(0)
    model = quac.inject(host(), quac.QuACConfig(where="all", norm="layer"))
    folder = quac.save_adapter(quac.inject(model, quac.PriorConfig(site="auto")), tmp_path_factory.mktemp("a"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a whole model."""
    model = timm.create_model("test_resnet_qacon", num_classes=3)
    folder = tmp_path_factory.mktemp("w")
    quac.push(model, WHOLE, whole=True, dry_run=folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- compared with the hash that the Hub gives


@pytest.mark.parametrize("form", ['W/"{}"', "{}", '"{}"'])
def test_a_hash_in_any_of_its_forms_is_compared(form, hub, adapter):
    hub.add(REPO, adapter)
    hub.tag(WEIGHTS_NAME, form)
    assert quac.injection_of(quac.load_adapter(host(), REPO)) is not None
    hub.add(REPO, {WEIGHTS_NAME: b"new" + adapter[WEIGHTS_NAME]})
    hub.replace(REPO, WEIGHTS_NAME, b"odd" + adapter[WEIGHTS_NAME])
    with pytest.raises(ValueError, match=r"is damaged: its hash is .* and the Hub said"):
        fetch(REPO)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("form", ['"{}-gzip"', f'"{"0123456789abcdef" * 2}"', f'"{"0123456789abcdef" * 4}"', '"other"'])
def test_an_etag_that_is_no_hash_is_not_believed_and_the_hub_is_asked(form, name, hub, adapter, monkeypatch):
    hub.add(REPO, adapter)
    hub.tag(name, form)
    folder = fetch(REPO)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == adapter
    with monkeypatch.context() as offline:  # undone before the test hub's own variables are
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=r"cannot be compared .* no hash of it.*not read|is damaged"):
            fetch(REPO)
    hub.replace(REPO, name, b"odd" + adapter[name][3:])
    with pytest.raises(ValueError, match=r"is damaged: its hash is .* and the Hub said"):
        fetch(REPO, force=True)


def test_without_any_hash_nothing_is_read(hub, adapter):
    hub.add(REPO, adapter)
    hub.tag(WEIGHTS_NAME, None)
    with pytest.raises((OSError, ValueError), match=r"(?i)etag|could not be re"):
        quac.load_adapter(host(), REPO)


def test_a_cache_without_links_asks_the_hub(hub, adapter, monkeypatch):
    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_: False)
    hub.add(REPO, adapter)
    path = fetch(REPO) / WEIGHTS_NAME
    assert not path.is_symlink()
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    fetch(REPO)  # fetched again
    assert path.read_bytes() == adapter[WEIGHTS_NAME]
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=r"cannot be compared .* knows no hash of it"):
            fetch(REPO)


# -- adapters


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"config__where": CATASTROPHE}, None),
        ({"config__where": ["all"] * 10_000}, None),
        ({"images__shape": [3, 65535, 65535]}, "has more than 67108864 numbers"),
        ({"images__shape": [3, 10**9, 10**9]}, "sizes of images are"),
        ({"config__quality": "contrique:passwd"}, "has shape .*, expected"),
        ({"config__reduction": 4096}, "reduction=4096 asks for 4096 hidden numbers or more, and a tensor has 16"),
        ({"prior__config__site": CATASTROPHE}, None),
        ({"prior__config__fdm_width": 65536, "prior__config__fdm": "dense"}, r"has shape .*, expected \(65536"),
        ({"prior__config__experts": [f"e{i}" for i in range(256)]}, "missing tensors: 256 experts"),
        (
            {"prior__sites": [{"name": f"x{i}", "channels": 8, "layout": "nchw"} for i in range(20_000)]},
            "is not an ad|not in",
        ),
        ({"config__mean": [10**400], "config__std": [1]}, "mean must be a number"),
        ({"prior__config__fdm": "x" * 1_000_000}, "unknown FDM 'xxx"),
        ({"host": {"architecture": "test_resnet", "fingerprint": {"a": [1]}}}, "other weights than this host"),
    ],
)
def test_the_config_of_an_adapter_asks_for_nothing_that_takes_time_memory_or_files(values, message, hub, adapter):
    hub.add(REPO, changed(adapter, CONFIG_NAME, **values))
    start, model = time.process_time(), host()
    if message is None:
        assert quac.injection_of(quac.load_adapter(model, REPO)) is not None
    else:
        with pytest.raises(ValueError, match=message) as caught:
            quac.load_adapter(model, REPO, check_host="host" in values)
        assert len(str(caught.value)) < 5000
        assert quac.injection_of(model) is None
    assert time.process_time() - start < 20


def test_configs_that_are_nested_without_end(hub, adapter):
    hub.add(REPO, {**adapter, CONFIG_NAME: b'{"a":' * 200_000})
    with pytest.raises(ValueError, match="is not an adapter's config"):
        quac.load_adapter(host(), REPO)


# -- whole models of timm


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_args__where": CATASTROPHE}, "where=.*is a regular expression, and those of a saved config are not"),
        ({"model_args__where": ["*", CATASTROPHE]}, "is a regular expression"),
        ({"model_args__quality": "contrique:/etc/passwd"}, "names a file of this machine"),
        ({"model_args__quality": "contrique:passwd"}, "names a file of this machine"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "names a checkpoint_path, a file of this machine"),
        ({"model_args": {"layers": [10**9, 1, 1, 1]}}, "1000000000 is more than any network has"),
        ({"model_args": {"layers": [100_000, 1, 1, 1]}}, "asks for a network far larger than its weights"),
        ({"model_args": {"num_classes": 900_000}}, "asks for a network far larger than its weights"),
    ],
)
def test_the_config_of_a_whole_model_asks_for_nothing_that_takes_time_or_files(values, message, hub, whole):
    hub.add(WHOLE, changed(whole, "config.json", **values))
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        timm.create_model(f"hf-hub:{WHOLE}", pretrained=True)
    assert time.process_time() - start < 20


def test_a_config_does_not_say_where_the_weights_are(hub, whole, tmp_path):
    """Neither a pickle, nor a file here, nor an address, nor another repository."""
    torch.save({}, tmp_path / "evil.bin")
    elsewhere = {
        "file": str(tmp_path / "evil.bin"), "url": "http://127.0.0.1:9/evil.bin", "hf_hub_id": "you/other",
        "hf_hub_filename": "evil.bin", "custom_load": "hf", "source": "",
    }  # fmt: skip
    config = json.loads(whole["config.json"])
    config["pretrained_cfg"] |= elsewhere
    hub.add(WHOLE, {**whole, "config.json": json.dumps(config).encode(), "evil.bin": b"\x80\x04."})
    model = timm.create_model(f"hf-hub:{WHOLE}", pretrained=True)
    assert quac.injection_of(model) is not None
    assert not any("evil" in request.path or "you/other" in request.path for request in hub.requests)
    (folder := tmp_path / "local").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(hub.files(WHOLE)[name])
    timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_a_model_that_was_put_together_by_a_regular_expression_is_saved_by_names(tmp_path):
    model = timm.create_model("test_resnet_qacon_ddp", where=r"re:layer1.*act\d", site="re:layer2$", num_classes=3)
    quac.push(model, WHOLE, whole=True, dry_run=tmp_path)
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert args["site"] == ["layer2"]
    assert args["where"] == [site.name for site in quac.injection_of(model).sites]
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert quac.injection_of(again).sites == quac.injection_of(model).sites
    names = model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], again.state_dict()[name]) for name in names)


def test_config_of_a_whole_model_that_was_changed_on_its_way(hub, whole):
    hub.add(WHOLE, whole)
    hub.replace(WHOLE, "config.json", whole["config.json"].replace(b'"num_classes": 3', b'"num_classes": 4'))
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        timm.create_model(f"hf-hub:{WHOLE}", pretrained=False)
