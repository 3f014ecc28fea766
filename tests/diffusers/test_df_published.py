"""Restoration pipelines by their published names, and what a user is told when there is none."""

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from typer.testing import CliRunner

import quac_plugins.hub.check
import quac_plugins.hub.published
from quac_plugins.commands import app
from quac_plugins.diffusers import QuACRestorationPipeline
from quac_plugins.hub.check import check_registry
from quac_plugins.hub.fetch import PIPELINE_FILES
from quac_plugins.hub.verify import sha256_of
from quac_plugins.impairments import IMPAIRMENTS, impair
from quac_plugins.registry import Entry, published, read_entries

NAME = "restoration_qacon.tiny"


@pytest.fixture
def registry(tmp_path, monkeypatch, pipeline):
    """A registry of its own with one embedded pipeline; the pipeline, and the file of its weights."""
    folder = tmp_path / "hub" / NAME
    original = pipeline()
    original.save_pretrained(folder)
    for name in ("README.md", "metrics.json"):
        (folder / name).write_text("{}")
    weights = folder / PIPELINE_FILES[-1]
    entry = Entry(NAME, "pipeline", sha256_of(weights), weights.stat().st_size, "mit")
    for module in (quac_plugins.hub.published, quac_plugins.hub.check):
        monkeypatch.setattr(module, "published", lambda door="timm": {NAME: entry} if door == "diffusers" else {})
    monkeypatch.setattr("quac_plugins.registry.data_folder", lambda name: tmp_path / name)
    monkeypatch.setattr("quac_plugins.hub.check.data_folder", lambda name: tmp_path / name)
    return original, weights


def test_by_its_name_it_restores_the_same_bits(registry, photograph):
    original, _ = registry
    found = QuACRestorationPipeline.from_pretrained(NAME)
    found.set_progress_bar_config(disable=True)
    image = photograph()
    expected, again = (np.asarray(pipe(image, num_inference_steps=2).images[0]) for pipe in (original, found))
    assert np.array_equal(expected, again)
    half = QuACRestorationPipeline.from_pretrained(NAME, torch_dtype=torch.float16)
    assert half.unet.dtype == torch.float16
    assert dict(check_registry()) == {NAME: []}


def test_other_bytes_than_were_published_are_refused(registry):
    _, weights = registry
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(ValueError, match="SHA-256"):
        QuACRestorationPipeline.from_pretrained(NAME)
    assert "SHA-256" in dict(check_registry())[NAME][0]
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"is to be embedded, but .* is missing"):
        QuACRestorationPipeline.from_pretrained(NAME)


def test_a_name_that_nobody_published_says_which_are():
    with pytest.raises(FileNotFoundError, match=r"no pipeline at 'restoration.nothing'.*published here \("):
        QuACRestorationPipeline.from_pretrained("restoration.nothing")


def test_ones_own_organization_stands_in(registry, hub, monkeypatch, photograph):
    original, _ = registry
    original.push_to_hub(f"me/{NAME}")
    monkeypatch.setenv("QUAC_HUB", "me")
    found = QuACRestorationPipeline.from_pretrained(NAME)
    found.set_progress_bar_config(disable=True)
    image = photograph()
    assert np.array_equal(np.asarray(original(image).images[0]), np.asarray(found(image).images[0]))


def test_entries_are_of_their_own_file(tmp_path):
    text = f'["{NAME}"]\nkind = "{{}}"\nsha256 = "{"a" * 64}"\nsize = 1\nlicense = "mit"\n'
    for file, kind in (("timm", "pipeline"), ("diffusers", "adapter")):
        (tmp_path / f"{file}.toml").write_text(text.format(kind))
        with pytest.raises(ValueError, match=f"kind must be .*, got '{kind}'"):
            read_entries(tmp_path / f"{file}.toml")


def test_the_command_line_names_them():
    result = CliRunner().invoke(app, ["list", "--what", "pipelines"])
    assert result.stdout.split() == list(published("diffusers"))


@pytest.mark.parametrize("name", published("diffusers"))
def test_what_is_embedded_restores_a_photograph(name):
    pipe = QuACRestorationPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    clean = np.ascontiguousarray(data.coffee()[100:292, 150:342])
    gains = []
    for kind in IMPAIRMENTS:
        degraded = impair(clean, kind, 4, seed=0)
        restored = np.asarray(pipe(degraded).images[0])
        gains.append(peak_signal_noise_ratio(clean, restored) - peak_signal_noise_ratio(clean, degraded))
    assert np.mean(gains) > 0.5
    assert published("diffusers")[name].size < 6e6  # bytes
