import json

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from quac_plugins.evaluate.data import CLEAN, ImageDirectory, read_class_map
from quac_plugins.images import read_image

PHOTO = Image.fromarray(photographs.astronaut()).resize((64, 48))


def tree(root, *names, image=PHOTO):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root


def targets(directory, condition=CLEAN):
    return {item.key: item.target for item in directory.conditions[condition]}


def test_folders_in_sorted_order(tmp_path):
    tree(tmp_path, "dog/b.JPG", "dog/deep er/ä.png", "cat/a.jpeg", "Zoo/x.bmp", "cat/.hidden.jpg", ".git/x.jpg")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    directory = ImageDirectory(tmp_path, 3)
    assert directory.class_to_index == {"Zoo": 0, "cat": 1, "dog": 2}
    assert targets(directory) == {"Zoo/x.bmp": 0, "cat/a.jpeg": 1, "dog/b.JPG": 2, "dog/deep er/ä.png": 2}
    assert not directory.is_imagenet_c


@pytest.mark.parametrize(
    ("num_classes", "indices"), [(1000, [0, 7, 999]), (21843, [6, 135, 11639]), (3, [0, 1, 2]), (None, [0, 1, 2])]
)
def test_synsets_have_their_place_in_imagenet(tmp_path, num_classes, indices):
    synsets = ["n01440764", "n01514668", "n15075141"]
    tree(tmp_path, *(f"{synset}/a.jpg" for synset in synsets))
    found = ImageDirectory(tmp_path, num_classes).class_to_index
    if num_classes == 21843:
        from timm.data import ImageNetInfo

        indices = [ImageNetInfo("imagenet-21k-goog").label_names().index(synset) for synset in synsets]
    assert list(found.values()) == indices


def test_a_synset_that_is_not_there_is_named(tmp_path):
    tree(tmp_path, "n01440764/a.jpg", "n99999999/a.jpg")
    with pytest.raises(ValueError, match="imagenet-1k has no index for 'n99999999'"):
        ImageDirectory(tmp_path, 1000)


def test_too_many_folders_for_the_network(tmp_path):
    tree(tmp_path, "a/1.png", "b/1.png", "c/1.png")
    with pytest.raises(ValueError, match="2 classes, but the sorted order of the folders gives c → 2"):
        ImageDirectory(tmp_path, 2)


def test_doubtful_orders_are_warned_of(tmp_path):
    tree(tmp_path, "2/x.png", "10/x.png")
    with pytest.warns(UserWarning, match="10 comes before 2"):
        assert ImageDirectory(tmp_path, 2).class_to_index == {"10": 0, "2": 1}
    with pytest.warns(UserWarning, match="2 folders for a network of 5 classes"):
        ImageDirectory(tmp_path, 5)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("m.json", '{"a": 4, "b c": 2}', {"a": 4, "b c": 2}),
        ("m.json", '["b c", "a"]', {"b c": 0, "a": 1}),
        ("m.txt", "a 4\nb c  2\n\n", {"a": 4, "b c": 2}),
        ("m.txt", "\ufeffb c\na\n", {"b c": 0, "a": 1}),
    ],
)
def test_class_maps(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_map(tmp_path / name) == expected
    root = tree(tmp_path / "images", "a/1.png", "b c/1.png")
    assert ImageDirectory(root, 5, tmp_path / name).class_to_index == expected


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("{}", "must give"), ('{"a": -1}', "from 0 on"), ('{"a": "1"}', "from 0")]
)
def test_bad_class_maps(tmp_path, text, message):
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_class_map(path)


def test_a_class_map_must_exist_and_name_every_folder(tmp_path):
    root = tree(tmp_path / "images", "a/1.png", "b/1.png")
    with pytest.raises(FileNotFoundError, match="no class map"):
        ImageDirectory(root, 5, tmp_path / "none.txt")
    with pytest.raises(ValueError, match="has no index for 'b'"):
        ImageDirectory(root, 5, {"a": 3})
    with pytest.raises(ValueError, match="5 classes, but the class map gives b → 7"):
        ImageDirectory(root, 5, {"a": 3, "b": 7})


def test_imagenet_c_by_structure(tmp_path):
    tree(tmp_path, "fog/1/n01440764/a.jpg", "fog/3/n01440764/a.jpg", "blue_noise_sample/2/n01514668/b.jpg")
    directory = ImageDirectory(tmp_path, 1000)
    assert directory.is_imagenet_c
    assert set(directory.conditions) == {("fog", 1), ("fog", 3), ("blue_noise_sample", 2)}
    assert targets(directory, ("blue_noise_sample", 2)) == {"n01514668/b.jpg": 7}


def test_numbered_folders_inside_of_classes_are_no_imagenet_c(tmp_path):
    tree(tmp_path, "dog/1/a.jpg", "cat/2/b.jpg")
    assert targets(ImageDirectory(tmp_path, 2)) == {"cat/2/b.jpg": 0, "dog/1/a.jpg": 1}


def test_directories_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        ImageDirectory(tmp_path / "none")
    with pytest.raises(ValueError, match="no folders of classes"):
        ImageDirectory(tree(tmp_path / "flat", "a.jpg"))
    (tmp_path / "empty" / "dog").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images below"):
        ImageDirectory(tmp_path / "empty")
    with pytest.raises(ValueError, match="splits, not classes"):
        ImageDirectory(tree(tmp_path / "set", "train/a/1.jpg", "val/a/1.jpg"))


def test_limit_spreads_over_classes_and_is_the_same_for_all_conditions(tmp_path):
    names = [f"{folder}/{i}.png" for folder, n in [("a", 8), ("b", 2), ("c", 5)] for i in range(n)]
    tree(tmp_path, *(f"{c}/{s}/{name}" for c, s in [("fog", 1), ("snow", 5)] for name in names))
    directory = ImageDirectory(tmp_path, 3)
    chosen = directory.limited(8, seed=0)
    keys = [[item.key for item in items] for items in chosen.values()]
    assert keys[0] == keys[1] == sorted(keys[0])
    assert sorted(key[0] for key in keys[0]) == ["a"] * 3 + ["b"] * 2 + ["c"] * 3
    assert {i.key for i in directory.limited(3, 0)["fog", 1]} <= {*keys[0]}
    assert [i.key for i in directory.limited(8, seed=1)["fog", 1]] != keys[0]
    assert directory.limited(None, 0) == directory.conditions
    assert len(directory.limited(100, 0)["fog", 1]) == 15
    with pytest.raises(ValueError, match="at least 1"):
        directory.limited(0, 0)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("L", "png"), ("1", "png")]
)
def test_modes_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"x.{suffix}"
    PHOTO.convert(mode).save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", PHOTO.size)


def test_sixteen_bit_grey_keeps_its_tones(tmp_path):
    grey = photographs.camera()[:40, :40]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "x.png")
    assert (np.asarray(read_image(tmp_path / "x.png"))[..., 1] == grey).all()


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [PHOTO.convert("P"), PHOTO.rotate(180).convert("P")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    difference = np.asarray(read_image(tmp_path / "x.gif"), int) - np.asarray(frames[0].convert("RGB"), int)
    assert np.abs(difference).mean() < 10


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    PHOTO.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == PHOTO.size


def test_broken_files_raise_oserror_with_their_name(tmp_path):
    PHOTO.save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    PHOTO.save(tmp_path / "whole.png")
    chunk = (tmp_path / "whole.png").read_bytes()
    contents = {"cut.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.png": b"hello", "cut.png": chunk[:60]}
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in [*contents, "float.tif", "missing.jpg"]:
        with pytest.raises(OSError, match=name):
            read_image(tmp_path / name)


def test_json_class_map_of_synsets_wins_over_imagenet(tmp_path):
    root = tree(tmp_path / "images", "n01440764/a.jpg")
    (tmp_path / "map.json").write_text(json.dumps({"n01440764": 12}))
    assert ImageDirectory(root, 1000, tmp_path / "map.json").class_to_index == {"n01440764": 12}
