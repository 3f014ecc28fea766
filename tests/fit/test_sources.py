import itertools
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.fit.data import Data
from quac_plugins.fit.photographs import Photographs
from quac_plugins.fit.sources import few_images
from quac_plugins.images import to_uint8

PHOTOS = {name: getattr(data, name)()[::4, ::4, :3] for name in ("astronaut", "chelsea", "coffee", "rocket")}


def save(root, name, pixels):
    path = Path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Four photographs, in folders, without loss."""
    root = tmp_path / "photographs"
    for place, (name, pixels) in enumerate(PHOTOS.items()):
        save(root, f"{'deep er/' * (place % 2)}{name}.png", pixels)
    save(root, ".hidden/x.png", pixels)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def pair_folders(folder, tmp_path):
    """The folder and a darker copy of it, as TIFF."""
    dark = tmp_path / "dark"
    for path in folder.rglob("*.png"):
        if ".hidden" not in path.parts:
            save(dark, path.relative_to(folder).with_suffix(".tif"), np.asarray(Image.open(path)) // 2)
    return dark, folder


class Items(Dataset):
    def __init__(self, items):
        self.items, self.asked = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.asked.append(index)
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def tensors(photographs, count=4):
    return photographs(count, 40)


def same(few, other):
    assert few.names == other.names
    assert len(few) == len(other)
    for a, b in zip(few.clean, other.clean, strict=True):
        assert (a == b).all()


# Files


def test_a_folder_gives_its_images_sorted_by_name(folder):
    few = few_images(folder)
    assert few.names == ["astronaut.png", "coffee.png", "deep er/chelsea.png", "deep er/rocket.png"]
    assert (few.degraded, few.labels, few.unreadable, len(few)) == (None, None, [], 4)
    for name, pixels in zip(few.names, few.clean, strict=True):
        assert pixels.dtype == np.uint8
        assert (pixels == PHOTOS[Path(name).stem]).all()


def test_a_folder_and_its_files_in_any_order_are_the_same(folder, monkeypatch):
    whole = few_images(folder)
    files = [folder / name for name in whole.names]
    for _ in range(3):
        random.shuffle(files)
        same(few_images(files), whole)
        same(few_images([str(file) for file in files], limit=3), few_images(folder, limit=3))
    same(few_images(path for path in folder.rglob("[a-z]*.png") if ".hidden" not in path.parts), whole)
    monkeypatch.chdir(folder)
    same(few_images(whole.names[::-1]), whole)


def test_one_file(folder):
    few = few_images(folder / "coffee.png")
    assert few.names == ["coffee.png"]
    assert (few.clean[0] == PHOTOS["coffee"]).all()
    same(few_images(str(folder / "coffee.png")), few)


def test_a_limit_chooses_by_seed_and_name_alone(folder, tmp_path, monkeypatch):
    chosen = few_images(folder, limit=2).names
    assert chosen == sorted(chosen)
    assert len(chosen) == 2
    assert {few_images(folder, limit=1).names[0]} < {*chosen}
    assert len({tuple(few_images(folder, limit=2, seed=seed).names) for seed in range(8)}) > 1
    assert few_images(folder, limit=9).names == few_images(folder).names
    shutil.copytree(folder, tmp_path / "elsewhere")
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((p, d, f[::-1]) for p, d, f in walk(*a, **k)))
    assert few_images(tmp_path / "elsewhere", limit=2).names == chosen


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_files_of_other_modes_become_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.fromarray(PHOTOS["coffee"]).convert(mode).save(tmp_path / f"x.{suffix}")
    pixels = few_images(tmp_path).clean[0]
    assert pixels.shape == PHOTOS["coffee"].shape
    assert pixels.dtype == np.uint8


def test_sixteen_bits_are_scaled_in_files_and_in_pil_images(tmp_path):
    grey = data.camera()[::4, ::4]
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    deep.save(tmp_path / "x.png")
    for few in (few_images(tmp_path), few_images(deep), few_images([deep])):
        assert (few.clean[0] == grey[..., None]).all()


def broken(folder):
    whole = (folder / "astronaut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("hello")
    (folder / "empty.jpg").write_bytes(b"")
    return [str(folder / name) for name in ("cut.png", "empty.jpg", "text.jpg")]


def test_what_cannot_be_read_is_left_out_with_a_warning(folder):
    whole = few_images(folder)
    files = broken(folder)
    with pytest.warns(UserWarning, match="3 could not be read and are left out: .*cut.png, .*empty.jpg, .*text.jpg"):
        few = few_images(folder)
    same(few, whole)
    assert few.unreadable == files
    with pytest.warns(UserWarning, match="left out"):
        assert len(few_images(folder, limit=4)) == 4  # others take the place of the broken ones


def test_none_can_be_read(folder):
    files = broken(folder)
    with pytest.raises(ValueError, match=r"no image is left: 3 could not be read, the first because: .*cut\.png"):
        few_images(files)
    with pytest.raises(ValueError, match=r"1 could not be read, the first because: cannot read .*notes\.txt"):
        few_images(folder / "notes.txt")


def test_places_that_hold_no_images(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere"):
        few_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images below .*empty \(extensions: \.bmp, .*\.webp\)"):
        few_images(tmp_path / "empty")
    missing = [folder / "astronaut.png", *(tmp_path / f"{i}.png" for i in range(5))]
    with pytest.raises(FileNotFoundError, match=r"0\.png, .*1\.png, .*2\.png and 2 more"):
        few_images(missing)
    with pytest.raises(ValueError, match=r"a list of files holds folders: .*deep er; give one folder"):
        few_images([folder / "astronaut.png", folder / "deep er"])
    with pytest.raises(TypeError, match="a list of files holds a ndarray too"):
        few_images([folder / "astronaut.png", PHOTOS["coffee"]])
    with pytest.raises(ValueError, match=r"given more than once: astronaut\.png"):
        few_images([folder / "astronaut.png", str(folder / "astronaut.png")])


def test_small_images_are_named_with_their_size(folder):
    save(folder, "thin.png", PHOTOS["coffee"][:20])
    with pytest.raises(ValueError, match=r"thin\.png is 150×20 \(width×height\), too small: .* at least 32; leave it"):
        few_images(folder)


# Arrays, tensors, Datasets


def test_what_arrays_tensors_and_pil_images_hold_is_the_same(photographs):
    stack = tensors(photographs)
    expected = (stack * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(pixels) for pixels in expected]
    floats = expected / 255
    kinds = [
        *(expected, list(expected), tuple(expected), floats, list(floats.astype(np.float32)), pictures, iter(pictures)),
        *(stack, list(stack), torch.from_numpy(expected).permute(0, 3, 1, 2), stack.double().requires_grad_()),
        *([stack[:3], stack[3:]], Items(pictures), Items(list(stack)), Stream(list(expected)), TensorDataset(stack)),
        *(DataLoader(TensorDataset(stack), 3), (picture for picture in pictures)),
    ]
    for kind in kinds:
        few = few_images(kind)
        assert few.names == ["image 0", "image 1", "image 2", "image 3"]
        assert (np.stack(few.clean) == expected).all()
        assert all(pixels.dtype == np.uint8 and pixels.flags.c_contiguous for pixels in few.clean)
        assert (few.labels, few.unreadable) == (None, [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(photographs, dtype):
    photo = tensors(photographs, 1)
    difference = few_images(photo.to(dtype)).clean[0].astype(int) - few_images(photo).clean[0]
    assert np.abs(difference).max() <= 1


def test_one_image_alone():
    photo = PHOTOS["coffee"]
    grey = photo[..., 0]
    for one in (photo, torch.from_numpy(photo.copy()).permute(2, 0, 1), Image.fromarray(photo)):
        assert (few_images(one).clean[0] == photo).all()
    for one in (grey, grey[..., None], torch.tensor(grey), torch.tensor(grey)[None], Image.fromarray(grey)):
        assert (few_images(one).clean[0] == grey[..., None]).all()


def test_the_result_is_a_copy():
    photo = PHOTOS["coffee"].copy()
    few = few_images([photo])
    photo[:] = 0
    assert (few.clean[0] == PHOTOS["coffee"]).all()


def test_images_of_different_sizes_keep_them():
    assert [pixels.shape for pixels in few_images(PHOTOS.values()).clean] == [p.shape for p in PHOTOS.values()]


def test_labels_are_kept_where_all_have_them(photographs):
    stack = tensors(photographs)
    labels = torch.tensor([5, 3, 3, 0])
    for source in (
        list(zip(stack, [5, 3, 3, 0], strict=True)),
        Items([(image, np.int64(label)) for image, label in zip(stack, labels, strict=True)]),
        TensorDataset(stack, labels),
        DataLoader(TensorDataset(stack, labels), 3),
        [(stack, labels)],
    ):
        few = few_images(source)
        assert few.labels == [5, 3, 3, 0]
        assert all(type(label) is int for label in few.labels)
    assert few_images([(stack[0], 1), stack[1]]).labels is None
    assert few_images([(stack[0], {"boxes": []}), (stack[1], 0.5)]).labels is None
    chosen = few_images(TensorDataset(stack, labels), limit=2)
    assert chosen.labels == [labels[int(name[-1])] for name in chosen.names]


def test_of_a_dataset_only_what_is_chosen_is_asked_for():
    photo = PHOTOS["coffee"]
    dataset = Items([photo] * 5000)
    few = few_images(dataset, limit=3, seed=1)
    assert len(dataset.asked) == 3
    assert few.names == [f"image {index}" for index in sorted(dataset.asked)]
    assert few_images(Stream(dataset.items), limit=3, seed=1).names == few.names
    assert few_images(itertools.repeat(photo, 5000), limit=3, seed=1).names == few.names


def test_items_that_cannot_be_read_are_left_out(folder):
    dataset = Items([PHOTOS["coffee"], OSError("image file is truncated"), PHOTOS["rocket"]])
    with pytest.warns(UserWarning, match="1 could not be read and are left out: image 1"):
        few = few_images(dataset)
    assert (few.names, few.unreadable) == (["image 0", "image 2"], ["image 1"])
    broken(folder)
    with pytest.warns(UserWarning, match="1 could not be read and are left out: image 1"):
        assert len(few_images([Image.open(folder / "coffee.png"), Image.open(folder / "cut.png")])) == 1
    with pytest.raises(RuntimeError, match="a bug"):
        few_images(Items([RuntimeError("a bug")]))


def test_normalized_images_are_refused(normalized):
    for source in (normalized(), Items(list(normalized()))):
        with pytest.raises(ValueError, match=r"image \d has values from -\d.* in \[0, 1\]: give them without normal"):
            few_images(source)
    with pytest.raises(ValueError, match="from 0 to 255"):
        few_images(np.linspace(0, 255, 40 * 40 * 3).reshape(40, 40, 3))
    with pytest.raises(ValueError, match="from nan to nan"):
        few_images(torch.full((3, 40, 40), torch.nan))
    assert few_images(torch.full((3, 40, 40), 1 + 1e-6)).clean[0].min() == 255


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((3, 40, 40), np.uint8), ValueError, r"image 0 has the shape \(3, 40, 40\); .* channels last"),
        (np.zeros((40, 40, 4), np.uint8), ValueError, r"image 0 has the shape \(40, 40, 4\); .* without alpha"),
        (torch.zeros(40, 40, 3), ValueError, r"image 0 has the shape \(40, 40, 3\); a tensor must"),
        (np.zeros((0, 40, 3), np.uint8), ValueError, r"the shape \(0, 40, 3\)"),
        (np.zeros((40, 40, 3), np.int64), TypeError, "image 0 is of dtype int64; expected uint8"),
        (torch.zeros(3, 40, 40, dtype=torch.bool), TypeError, "image 0 is of dtype torch.bool; expected uint8"),
        (Image.new("F", (40, 40)), ValueError, "image 0 is a PIL image of floats"),
        ([PHOTOS["coffee"], {"image": 1}], TypeError, "image 1 is of type dict; expected an array"),
        ([PHOTOS["coffee"], None], TypeError, "image 1 is of type NoneType"),
        ([(1, 2, 3)], TypeError, "a tuple of 3; expected an image or"),
        ([(PHOTOS["coffee"], PHOTOS["coffee"])], TypeError, r"two images, .*: give pairs=\(degraded, clean\)"),
        (Items([(PHOTOS["coffee"], Image.new("L", (9, 9)))]), TypeError, "image 0 holds two images"),
        ({"a": PHOTOS["coffee"]}, TypeError, "given as dict; expected a folder"),
        (7, TypeError, "given as int; expected a folder"),
        ([], ValueError, "no images: give at least one"),
        (Items([]), ValueError, "no images: give at least one"),
        (np.zeros((0, 40, 40, 3), np.uint8), ValueError, "no images: give at least one"),
    ],
)
def test_what_is_no_image_is_named(source, error, message):
    with pytest.raises(error, match=message):
        few_images(source)


def test_arguments():
    photo = PHOTOS["coffee"]
    with pytest.raises(ValueError, match=r"either images or pairs=\(degraded, clean\), got neither"):
        few_images()
    with pytest.raises(ValueError, match="got both"):
        few_images([photo], pairs=([photo], [photo]))
    for limit in (0, -3):
        with pytest.raises(ValueError, match=f"limit must be at least 1, got {limit}"):
            few_images([photo], limit=limit)


def test_single_images_as_uint8():
    assert to_uint8(np.array([[0.5]]), "x").tolist() == [[[128] * 3]]
    with pytest.raises(TypeError, match="my image is of type list"):
        to_uint8([[1]], "my image")


# Pairs


def test_folders_are_matched_by_name_without_extension(pair_folders):
    few = few_images(pairs=pair_folders)
    assert few.names == few_images(pair_folders[1]).names
    assert len(few.degraded) == 4
    for clean, degraded in zip(few.clean, few.degraded, strict=True):
        assert (degraded == clean // 2).all()
    chosen = few_images(pairs=tuple(map(str, pair_folders)), limit=2)
    assert chosen.names == few_images(pair_folders[1], limit=2).names
    assert all((degraded == clean // 2).all() for clean, degraded in zip(chosen.clean, chosen.degraded, strict=True))


def test_extensions_that_change_the_order_do_not_mix_pairs_up(tmp_path):
    for folder, half, first in (("clean", 1, "x.bmp"), ("dark", 2, "x.png")):  # x.bmp comes before x.k.png
        save(tmp_path, f"{folder}/{first}", PHOTOS["coffee"] // half)
        save(tmp_path, f"{folder}/x.k.png", PHOTOS["coffee"][::-1] // half)
    few = few_images(pairs=(tmp_path / "dark", tmp_path / "clean"))
    assert few.names == ["x.bmp", "x.k.png"]
    assert all((degraded == clean // 2).all() for clean, degraded in zip(few.clean, few.degraded, strict=True))


def test_lists_are_matched_by_order(pair_folders, photographs):
    whole = few_images(pairs=pair_folders)
    places = [2, 0, 3, 1]
    files = [pair_folders[1] / whole.names[i] for i in places]
    darker = [pair_folders[0] / Path(whole.names[i]).with_suffix(".tif") for i in places]
    shuffled = few_images(pairs=(darker, files))
    same(shuffled, whole)
    assert all((a == b).all() for a, b in zip(shuffled.degraded, whole.degraded, strict=True))

    stack = tensors(photographs)
    for degraded, clean in ((stack / 2, stack), (list(stack / 2), Items(list(stack))), (iter(stack / 2), iter(stack))):
        few = few_images(pairs=(degraded, clean), limit=3)
        assert len(few) == 3
        for name, a, b in zip(few.names, few.clean, few.degraded, strict=True):
            assert (a == to_uint8(stack[int(name[-1])], "")).all()
            assert (b == to_uint8(stack[int(name[-1])] / 2, "")).all()


def test_one_clean_image_may_have_several_degraded_versions(pair_folders, tmp_path):
    clean = pair_folders[1] / "astronaut.png"
    versions = [save(tmp_path, f"{i}.png", PHOTOS["astronaut"] // i) for i in (3, 2)]
    few = few_images(pairs=(versions, [clean, clean]))
    assert few.names == ["2.png", "3.png"]
    assert (few.degraded[0] == few.clean[0] // 2).all()
    with pytest.raises(ValueError, match=r"given more than once: 2\.png"):
        few_images(pairs=([versions[1]] * 2, [clean, clean]))


def test_labels_of_pairs(photographs):
    stack = tensors(photographs, 2)
    labelled = list(zip(stack, [4, 2], strict=True))
    assert few_images(pairs=(stack / 2, labelled)).labels == [4, 2]
    assert few_images(pairs=(labelled, stack)).labels == [4, 2]


def test_a_pair_is_left_out_if_either_cannot_be_read(pair_folders):
    (pair_folders[0] / "coffee.tif").write_bytes(b"II*")
    with pytest.warns(UserWarning, match=r"1 could not be read and are left out: .*coffee\.tif"):
        few = few_images(pairs=pair_folders)
    assert few.unreadable == [str(pair_folders[0] / "coffee.tif")]
    assert "coffee.png" not in few.names
    assert len(few.clean) == len(few.degraded) == 3


def test_pairs_that_do_not_match(pair_folders, tmp_path, photographs):
    dark, folder = pair_folders
    stack = tensors(photographs)
    save(folder, "a.png", PHOTOS["coffee"])
    for name in "bcdef":
        save(dark, f"{name}.png", PHOTOS["coffee"])
    with pytest.raises(ValueError, match=r"no partner: b, c, d and 2 more only in .*dark; a only in .*photographs"):
        few_images(pairs=pair_folders)
    save(folder, "a.bmp", PHOTOS["coffee"])
    with pytest.raises(ValueError, match=r"without extension, but .*photographs holds several of a"):
        few_images(pairs=pair_folders)
    with pytest.raises(ValueError, match="2 degraded and 4 clean images"):
        few_images(pairs=(stack[:2], stack))
    for mixed in ((dark, stack), ([dark / "b.png"], folder)):
        with pytest.raises(ValueError, match=r"as a folder .* and something else"):
            few_images(pairs=mixed)
    for odd, what in (((stack,), "a tuple of 1"), ([(stack, stack)], "a list of 1"), (folder, "a PosixPath")):
        with pytest.raises(ValueError, match=rf"a tuple \(degraded, clean\) of .*, got {what}"):
            few_images(pairs=odd)
    with pytest.raises(ValueError, match="there are no degraded images"):
        few_images(pairs=([], stack))
    with pytest.raises(ValueError, match="degraded image 1 has values from"):
        few_images(pairs=([stack[0], stack[1] - 0.5], stack[:2]))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        few_images(pairs=(tmp_path / "nowhere", folder))


def test_pairs_of_two_sizes_are_named(pair_folders):
    save(pair_folders[0], "coffee.tif", PHOTOS["coffee"][:90])
    with pytest.raises(
        ValueError, match=r"one size, but .*coffee\.tif is 150×90 \(width×height\) and .*coffee\.png is "
    ):
        few_images(pairs=pair_folders)


def test_photographs_of_one_colour_are_told(photos):
    images = [photos[0], np.full((64, 64, 3), (9, 80, 200), np.uint8), photos[1]]
    with pytest.warns(UserWarning, match=r"1 of 3 photographs are of one colour \(image 1\)"):
        Photographs(timm.create_model("test_resnet"), Data(images=images), PriorConfig(), 8)
