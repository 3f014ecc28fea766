"""Packed sets: what is written is what was packed; what cannot be one is refused before anything is written."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from quac_plugins.evaluate import npz
from quac_plugins.evaluate.data import CLEAN, ImageDirectory


@pytest.fixture
def photographs():
    """Three real photographs as JPEG bytes."""
    files = []
    for name in ("astronaut", "chelsea", "coffee"):
        buffer = io.BytesIO()
        Image.fromarray(getattr(data, name)()).resize((32, 32)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


def pack(path, files, labels=(1, 0, 1), classes=("cat", "dog"), **changes):
    arrays = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array(labels),
        "classes": np.array(classes),
    }
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})
    return path


def test_pictures_come_out_byte_for_byte_under_their_classes(tmp_path, photographs):
    folder = npz.unpack(pack(tmp_path / "val.npz", photographs), tmp_path / "val")
    items = ImageDirectory(folder, num_classes=2).conditions[CLEAN]
    assert [(item.key, item.target) for item in items] == [
        ("cat/00001.jpg", 0),
        ("dog/00000.jpg", 1),
        ("dog/00002.jpg", 1),
    ]
    assert [item.path.read_bytes() for item in items] == [photographs[i] for i in (1, 0, 2)]


def test_again_into_the_same_folder(tmp_path, photographs):
    path = pack(tmp_path / "val.npz", photographs)
    npz.unpack(path, tmp_path / "val")
    (tmp_path / "val/cat/00001.jpg").unlink()
    kept = (tmp_path / "val/dog/00000.jpg").stat().st_mtime_ns
    npz.unpack(path, tmp_path / "val")
    assert (tmp_path / "val/cat/00001.jpg").read_bytes() == photographs[1]
    assert (tmp_path / "val/dog/00000.jpg").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": (0, 1)}, "4 offsets for 2 labels, expected one more"),
        ({"labels": (0, 1, 2)}, "labels that name no class"),
        ({"labels": (0, -1, 1)}, "labels that name no class"),
        ({"offsets": np.array([0, 10, 5, 20])}, "offsets that leave the bytes"),
        ({"offsets": np.array([0, 10, 20, 10**9])}, "offsets that leave the bytes"),
        ({"offsets": np.array([], np.int64), "labels": ()}, "0 offsets for 0 labels"),
        ({"classes": ("../cat", "dog")}, "classes that are no names of folders"),
        ({"classes": ("dog", "cat")}, "classes that are not in the order of their names"),
        ({"classes": ("cat", "cat")}, "classes that are not in the order of their names"),
        ({"jpeg": None}, "is no packed set of pictures .*jpeg"),
        ({"classes": np.array(["cat", {}], dtype=object)}, "is no packed set of pictures"),
    ],
)
def test_what_is_no_packed_set_is_refused(changes, message, tmp_path, photographs):
    path = pack(tmp_path / "val.npz", photographs, **changes)
    with pytest.raises(ValueError, match=message):
        npz.unpack(path, tmp_path / "val")
    assert not (tmp_path / "val").exists()


def test_what_is_no_npz_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        npz.unpack(tmp_path / "val.npz", tmp_path / "val")
    for content in (b"", b"text", b"PK\x03\x04cut off"):
        (tmp_path / "val.npz").write_bytes(content)
        with pytest.raises(ValueError, match="is no packed set"):
            npz.unpack(tmp_path / "val.npz", tmp_path / "val")
