import errno
import os

import pytest
import torch

from quac_plugins.fit.checkpoint import Checkpoints

KEY = {"host": "a", "recipe": {"steps": 4, "lr": 0.1}}
STATE = {"step": 3, "parameters": {"a.b": torch.arange(4.0)}, "curve": [{"step": 0, "loss": None, "held_out": 1.5}]}


def test_what_was_saved_is_loaded(tmp_path):
    keep = Checkpoints(tmp_path / "new" / "folder", KEY)
    assert keep.load("fog") is None
    keep.save("fog", STATE)
    found = Checkpoints(tmp_path / "new" / "folder", dict(reversed(KEY.items()))).load("fog")
    assert torch.equal(found["parameters"].pop("a.b"), STATE["parameters"]["a.b"])
    assert found == {**STATE, "parameters": {}}
    assert keep.load("snow") is None
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["fit-fog.pt"]


def test_states_of_others_are_refused(tmp_path):
    Checkpoints(tmp_path, KEY).save("fog", STATE, "these pictures")
    for key, of in ((KEY, "others"), (KEY, ""), ({**KEY, "host": "b"}, "these pictures")):
        with pytest.raises(ValueError, match=r"fit-fog.pt belongs to another fit .* delete it, or give another folder"):
            Checkpoints(tmp_path, key).load("fog", of)
    assert Checkpoints(tmp_path, KEY).load("fog", "these pictures")["step"] == 3


@pytest.mark.parametrize("content", [b"", b"no archive", "half", {"state": {}}, [1, 2]])
def test_damaged_files_are_refused(tmp_path, content):
    keep = Checkpoints(tmp_path, KEY)
    keep.save("fog", STATE)
    path = tmp_path / "fit-fog.pt"
    if content == "half":
        path.write_bytes(path.read_bytes()[:200])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="no state of a fit that can be read"):
        keep.load("fog")


def test_code_in_a_file_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    keep = Checkpoints(tmp_path, KEY)
    torch.save({"digest": keep.digest, "state": Harm()}, tmp_path / "fit-fog.pt")
    with pytest.raises(ValueError, match="UnpicklingError"):
        keep.load("fog")
    assert not (tmp_path / "harm").exists()


def test_an_interrupted_save_leaves_the_state_before(tmp_path, monkeypatch):
    keep = Checkpoints(tmp_path, KEY)
    keep.save("fog", STATE)

    def half(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        keep.save("fog", {**STATE, "step": 9})
    assert keep.load("fog")["step"] == 3


def test_only_the_process_that_writes_writes(tmp_path):
    other = Checkpoints(tmp_path / "states", KEY, writes=False)
    other.save("fog", STATE)
    assert not (tmp_path / "states").exists()
    Checkpoints(tmp_path / "states", KEY).save("fog", STATE)
    assert other.load("fog")["step"] == 3
    other.clear()
    assert other.load("fog")["step"] == 3


def test_clear_leaves_what_others_wrote_and_folders_that_were_there(tmp_path):
    (tmp_path / "fit-mine.pt").write_text("precious")
    keep = Checkpoints(tmp_path, KEY)
    keep.save("fog", STATE)
    keep.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["fit-mine.pt"]
    (tmp_path / "empty").mkdir()
    keep = Checkpoints(tmp_path / "empty", KEY)
    keep.save("fog", STATE)
    keep.clear()
    assert (tmp_path / "empty").is_dir()


def test_a_folder_that_a_fit_made_goes_with_it_also_in_another_process(tmp_path):
    Checkpoints(tmp_path / "states", KEY).save("fog", STATE)
    again = Checkpoints(tmp_path / "states", KEY)
    again.load("fog")
    again.clear()
    assert not (tmp_path / "states").exists()


def test_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint='.*file': no folder can be made there"):
        Checkpoints(tmp_path / "file", KEY)


def test_clear_takes_the_states_alone(tmp_path):
    keep = Checkpoints(tmp_path / "a", KEY)
    keep.save("fog", STATE)
    keep.clear()
    assert not (tmp_path / "a").exists()
    keep = Checkpoints(tmp_path, KEY)
    keep.save("fog", STATE)
    (tmp_path / "adapter_config.json").write_text("{}")
    keep.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    none = Checkpoints(None, KEY)
    none.save("fog", STATE)
    none.clear()
    assert none.load("fog") is None


def test_a_state_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    keep = Checkpoints(tmp_path / "states", KEY)
    keep.save("fog", STATE)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(UserWarning, match=r"fit-fog\.pt was not written: the disk is full.* The fit goes on"):
        keep.save("fog", {**STATE, "step": 9})
    assert keep.load("fog")["step"] == 3
