import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from quac_plugins.degradations import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    GROUPS,
    Corrupt,
    corrupt,
    corruption_names,
    image_seed,
)

NAMES = CORRUPTIONS + EXTRA_CORRUPTIONS
RANDOM = [
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "elastic_transform",
    "speckle_noise",
    "spatter",
]


def photograph(width=96, height=64):
    return np.array(Image.fromarray(data.astronaut()).resize((width, height)))


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def test_names_are_the_librarys():
    import imagecorruptions

    assert list(CORRUPTIONS) == imagecorruptions.get_corruption_names("common")
    assert list(EXTRA_CORRUPTIONS) == imagecorruptions.get_corruption_names("validation")
    for group, names in GROUPS.items():
        assert list(names) == imagecorruptions.get_corruption_names(group)


def test_corruption_names_of_sets_lists_and_spellings():
    assert corruption_names("all") == list(CORRUPTIONS)
    assert corruption_names("extra") == list(EXTRA_CORRUPTIONS)
    assert corruption_names("every") == corruption_names("all+extra") == list(NAMES)
    assert corruption_names("Fog, gaussian-noise,fog") == ["fog", "gaussian_noise"]
    assert corruption_names(["digital", "contrast,fog"]) == [*GROUPS["digital"], "fog"]
    assert corruption_names("") == corruption_names(()) == []


@pytest.mark.parametrize(
    ("spec", "message"), [("fgo", "Did you mean fog"), ("xyz", "Known: gaussian_noise"), ([3], "3"), (7, "int")]
)
def test_unknown_names_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        corruption_names(spec)


@pytest.mark.parametrize("name", NAMES)
def test_any_size_and_severity(name):
    for width, height in [(1, 1), (7, 31), (32, 32), (45, 77), (224, 224), (500, 333)]:
        image = photograph(width, height)
        before = image.copy()
        for severity in (1, 2, 3, 4, 5) if 32 <= width < 100 else (3,):
            result = corrupt(image, name, severity, seed=1)
            assert result.shape == image.shape
            assert result.dtype == np.uint8
            if width >= 224:
                assert (result != image).mean() > 0.01
        assert (image == before).all()


@pytest.mark.parametrize("name", NAMES)
def test_severity_does_more_the_higher_it_is(name):
    image = photograph(224, 224).astype(int)
    drift = [np.abs(corrupt(image.astype(np.uint8), name, s, seed=3) - image).mean() for s in (1, 5)]
    assert drift[0] < drift[1] or name == "saturate"  # saturate takes colour away first, and then adds it


@pytest.mark.parametrize("name", ["gaussian_noise", "fog", "frost", "contrast", "jpeg_compression", "defocus_blur"])
def test_the_corruption_is_the_librarys(name):
    import imagecorruptions

    image = photograph(224, 160)
    np.random.seed(5)
    expected = imagecorruptions.corrupt(image, severity=2, corruption_name=name)
    assert (corrupt(image, name, 2, seed=5) == expected).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_and_the_global_generator_is_left_alone(name):
    image = photograph()
    np.random.seed(0)
    first = corrupt(image, name, 3, seed=11)
    after = np.random.random(3)
    np.random.seed(0)
    assert (np.random.random(3) == after).all()
    assert (corrupt(image, name, 3, seed=11) == first).all()
    assert (corrupt(image, name, 3, seed=11 + 2**32) == first).all()
    differs = any((corrupt(image, name, 3, seed=s) != first).any() for s in (12, 13, 14))
    assert differs == (name in RANDOM)


def test_the_generator_is_put_back_after_an_error(monkeypatch):
    import imagecorruptions

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(imagecorruptions, "corrupt", broken)
    np.random.seed(0)
    with pytest.raises(RuntimeError, match="broken"):
        corrupt(photograph(), "fog", 3)
    after = np.random.random()
    np.random.seed(0)
    assert np.random.random() == after


def test_threads_get_what_one_thread_gets():
    image = photograph()
    jobs = [(name, seed) for seed in range(3) for name in RANDOM]
    serial = [digest(corrupt(image, name, 3, seed)) for name, seed in jobs]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda job: digest(corrupt(image, job[0], 3, job[1])), jobs))
    assert parallel == serial


def test_another_process_in_another_order_gets_the_same():
    code = (
        "import numpy as np\n"
        "from quac_plugins.degradations import corrupt\n"
        "import hashlib\n"
        "image = np.arange(64 * 48 * 3).reshape(64, 48, 3).astype(np.uint8)\n"
        f"for name in {sorted(NAMES, reverse=True)}:\n"
        "    print(name, hashlib.sha256(corrupt(image, name, 4, 9).tobytes()).hexdigest()[:16])\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    image = np.arange(64 * 48 * 3).reshape(64, 48, 3).astype(np.uint8)
    assert dict(line.split() for line in output.splitlines()) == {n: digest(corrupt(image, n, 4, 9)) for n in NAMES}


def test_spatter_without_a_drop_leaves_the_image():
    image = photograph(32, 32)
    results = [corrupt(image, "spatter", 1, seed) for seed in range(100)]
    assert any((result == image).all() for result in results)
    assert all(result.any() for result in results)


def test_grey_and_pil_images():
    grey = data.camera()[:64, :80]
    expected = corrupt(np.stack([grey] * 3, axis=-1), "fog", 2, seed=4)
    for image in (grey, grey[..., None], Image.fromarray(grey)):
        assert (corrupt(image, "fog", 2, seed=4) == expected).all()
    palette = Image.fromarray(photograph()).convert("P")
    assert corrupt(palette, "fog", 2).shape == (64, 96, 3)
    flipped = photograph()[:, ::-1]
    assert (corrupt(flipped, "pixelate", 2) == corrupt(flipped.copy(), "pixelate", 2)).all()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((40, 40, 3), np.float32), TypeError, "uint8"),
        (torch.zeros(3, 40, 40, dtype=torch.uint8), TypeError, "Tensor"),
        ([[0]], TypeError, "list"),
        (np.zeros((3, 40, 40), np.uint8), ValueError, "H, W, 3"),
        (np.zeros((40, 40, 4), np.uint8), ValueError, "H, W, 3"),
        (np.zeros((0, 40, 3), np.uint8), ValueError, "H, W, 3"),
    ],
)
def test_other_images_are_refused(image, error, message):
    with pytest.raises(error, match=message):
        corrupt(image, "fog", 3)


@pytest.mark.parametrize("severity", [0, 6, -1, 2.0, "3", True, None])
def test_other_severities_are_refused(severity):
    with pytest.raises(ValueError, match="1 to 5"):
        corrupt(photograph(), "fog", severity)
    with pytest.raises(ValueError, match="1 to 5"):
        Corrupt("fog", [severity])


def test_an_unknown_corruption_is_refused():
    with pytest.raises(ValueError, match="Did you mean fog"):
        corrupt(photograph(), "fogg", 3)


def test_without_the_library_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ImportError, match=r'pip install "quac-plugins\[evaluate\]"'):
        corrupt(photograph(), "fog", 3)


def test_image_seed_is_fixed_and_sensitive_to_each_part():
    seeds = [image_seed(*a) for a in [(0, "fog", 3, "k"), (1, "fog", 3, "k"), (0, "snow", 3, "k"), (0, "fog", 4, "k")]]
    assert len({*seeds, image_seed(0, "fog", 3, "l")}) == 5
    assert image_seed(0, "fog", 3, "n01440764/1.jpg") == 3247320534
    assert image_seed(0, "fog", 3, "caf\udce9") != image_seed(0, "fog", 3, "café")  # a name that is no UTF-8


def test_the_transform_depends_on_seed_and_pixels_alone():
    images = [photograph(), photograph()[::-1].copy(), photograph()[:, ::-1].copy()]
    transform = Corrupt("noise,fog", [2, 4], seed=3)
    forward = [digest(transform(image)) for image in images]
    backward = [digest(transform(image)) for image in reversed(images)]
    assert forward == backward[::-1]
    assert [digest(Corrupt("noise,fog", [2, 4], seed=4)(image)) for image in images] != forward


def test_the_transform_in_a_torchvision_pipeline():
    from torchvision import transforms

    pipeline = transforms.Compose([transforms.Resize(64), Corrupt("fog", 3), transforms.ToTensor()])
    image = Image.fromarray(data.chelsea())
    assert pipeline(image).shape == (3, 64, 96)
    assert isinstance(Corrupt("fog")(image.convert("L")), Image.Image)
    assert isinstance(Corrupt("fog")(photograph()), np.ndarray)


def test_the_transform_without_a_seed_follows_torch():
    transform, image = Corrupt("all", [1, 2, 3, 4, 5], seed=None), photograph()
    torch.manual_seed(0)
    first = [digest(transform(image)) for _ in range(5)]
    assert len(set(first)) == 5
    torch.manual_seed(0)
    assert [digest(transform(image)) for _ in range(5)] == first


def test_an_empty_transform_is_refused():
    for names, severity in [("", 3), ("fog", [])]:
        with pytest.raises(ValueError, match="at least one"):
            Corrupt(names, severity)
