"""An adapter's two files belong together: whoever reads gets the old adapter or the new one, or is told."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import quac_plugins as quac
from quac_plugins import load_adapter, save_adapter
from quac_plugins.core.files import replacing

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def host():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())


def with_slope(value, where="1"):
    """Two adapters of the same shapes can be told by their numbers and, at other sites, by their config."""
    model = quac.inject(host(), quac.QuACConfig(activation="acon", where=where))
    with torch.no_grad():
        model.get_submodule(where).p1.fill_(value)
    return model


def read(folder):
    model = load_adapter(host(), folder)
    (site,) = quac.injection_of(model).sites
    return site.name, float(model.get_submodule(site.name).p1.detach().mean())


def unseal(folder):
    values = json.loads((folder / CONFIG).read_text())
    del values["sha256"]
    (folder / CONFIG).write_text(json.dumps(values))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_save_that_ends_between_its_files_leaves_one_of_the_adapters_whole(at, sealed, how, tmp_path, monkeypatch):
    save_adapter(with_slope(1, "1"), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    if not sealed:
        unseal(tmp_path)  # as earlier versions wrote it
    calls, usual = [], os.replace

    def replace(*args):
        assert read(tmp_path) in (("1", 1.0), ("3", 2.0))  # whoever reads meanwhile
        if len(calls) == at:
            if how == "killed":
                monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # who is killed tidies nothing
            raise Killed
        calls.append(args)
        usual(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if at < 2:
            with pytest.raises(Killed):
                save_adapter(with_slope(2, "3"), tmp_path)
        else:
            save_adapter(with_slope(2, "3"), tmp_path)
    assert read(tmp_path) == (("1", 1.0) if at == 0 else ("3", 2.0))
    save_adapter(with_slope(3, "1"), tmp_path)
    assert read(tmp_path) == ("1", 3.0)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damaged_and_mixed_files_are_told_by_name(tmp_path):
    for value, name in ((1, "a"), (2, "b")):
        save_adapter(with_slope(value), tmp_path / name)
    content = (tmp_path / "a" / WEIGHTS).read_bytes()
    for damaged in (content[:-3] + bytes([content[-3] ^ 8]) + content[-2:], (tmp_path / "b" / WEIGHTS).read_bytes()):
        (tmp_path / "a" / WEIGHTS).write_bytes(damaged)
        for use in (read, lambda folder: quac.push(folder, "me/it", dry_run=tmp_path / "sent")):
            with pytest.raises(ValueError, match=rf"{WEIGHTS} has the SHA-256 .* damaged, or the two files are of two"):
                use(tmp_path / "a")
    unseal(tmp_path / "a")  # an adapter of an earlier version says nothing of its tensors
    assert read(tmp_path / "a") == ("1", 2.0)


def test_a_new_folder_appears_whole_and_files_have_the_users_mode(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "new" / "folder") as beside:
            (beside / "b.json").write_text("{}")
            (beside / "a.safetensors").write_bytes(b"1")
            assert not (tmp_path / "new" / "folder").exists()
        save_adapter(with_slope(1), tmp_path / "new" / "folder")
    finally:
        os.umask(before)
    paths = sorted((tmp_path / "new").rglob("*"))
    assert [path.name for path in paths] == ["folder", "a.safetensors", CONFIG, WEIGHTS, "b.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths[1:]} == {0o640}
    assert stat.S_IMODE(paths[0].stat().st_mode) == 0o750


def full(self, data):
    raise OSError(errno.ENOSPC, "No space left on device", str(self))


def test_a_full_disk_and_a_file_in_the_way_are_told_in_plain_words(tmp_path, monkeypatch):
    save_adapter(with_slope(1), tmp_path / "it")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=rf"{tmp_path / 'it'} was not written: the disk is full") as error:
            save_adapter(with_slope(2), tmp_path / "it")
        assert error.value.errno == errno.ENOSPC
    assert read(tmp_path / "it") == ("1", 1.0)
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == [CONFIG, WEIGHTS]
    with pytest.raises(NotADirectoryError, match=CONFIG):
        save_adapter(with_slope(2), tmp_path / "it" / CONFIG)


SPOILED = {
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"weight' is pruned.*prune\.remove\("),
    "parametrized": (lambda layer: parametrizations.weight_norm(layer), "weight' is parametrized.*remove_parametriz"),
    "weight norm": (lambda layer: weight_norm(layer), "weight' is under weight_norm.*remove_weight_norm"),
    "spectral norm": (lambda layer: spectral_norm(layer), "weight' is under spectral_norm.*remove_spectral_norm"),
    "not a number": (lambda layer: layer.weight.data.fill_(float("nan")), "weight' holds NaN or infinity"),
    "infinite": (lambda layer: layer.weight.data[0].fill_(float("-inf")), "weight' holds NaN or infinity"),
    "no numbers": (lambda layer: layer.to("meta"), "' is on the meta device"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", SPOILED)
def test_what_nobody_could_load_is_refused(how, cheap, tmp_path):
    spoil, message = SPOILED[how]
    model = quac.inject(host(), quac.QuACConfig(where="1", quality=cheap, norm="none"))
    save_adapter(model, tmp_path / "before")
    spoil(model.get_submodule("1").fc1)
    for use in (save_adapter, lambda model, folder: quac.push(model, "me/it", dry_run=folder)):
        with pytest.raises(ValueError, match=rf"tensor '1\.fc1\.{'.*' if how == 'no numbers' else ''}{message}"):
            use(model, tmp_path / "spoiled")
    assert not (tmp_path / "spoiled").exists()


def test_a_spoiled_host_is_not_sent_whole(tmp_path):
    import timm

    model = timm.create_model("test_resnet_qacon")
    prune.l1_unstructured(model.fc, "weight", 0.5)
    with pytest.raises(ValueError, match=r"tensor 'fc\.weight' is pruned"):
        quac.push(model, "me/it", whole=True, dry_run=tmp_path / "sent")
