"""What a repository says of a pipeline or a network can be refused, and no more."""

import json
import time

import diffusers
import pytest
import torch
from hub_fixtures import CATASTROPHE, changed
from safetensors.torch import load, save

import quac_plugins as quac
from quac_plugins.diffusers import QuACRestorationPipeline, QuACUNet2DModel


@pytest.fixture(scope="module")
def restorer(tmp_path_factory):
    """The files of a restoration pipeline, path → bytes."""
    torch.manual_seed(0)
    unet = QuACUNet2DModel(
        block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=4, quac={"where": "all"},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("p")
    QuACRestorationPipeline(unet, diffusers.FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WEIGHTS, CONFIG = "unet/diffusion_pytorch_model.safetensors", "unet/config.json"


def loaded(**options):
    return QuACRestorationPipeline.from_pretrained("me/restorer", **options)


def test_every_file_of_a_pipeline_is_compared(hub, restorer):
    hub.add("me/restorer", restorer)
    assert quac.injection_of(loaded().unet) is not None
    for name in restorer:
        hub.add("me/restorer", {"notes.txt": name.encode()})
        hub.replace("me/restorer", name, restorer[name][:-2] + b"\n}")
        with pytest.raises(ValueError, match="is damaged"):
            loaded(force_download=True)
        hub.heal()


def test_no_pickle_comes_in_through_diffusers(hub, restorer):
    files = {name: data for name, data in restorer.items() if name != WEIGHTS}
    hub.add("me/restorer", {**files, "unet/diffusion_pytorch_model.bin": b"\x80\x04."})
    for build in (loaded, lambda: QuACUNet2DModel.from_pretrained("me/restorer", subfolder="unet")):
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin and no .*safetensors.*any code"):
            build()
    with pytest.raises(ValueError, match="use_safetensors=False would open a pickle"):
        loaded(use_safetensors=False)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("model_index.json", {"unet": ["os", "system"]}, r"names 'os.system' as unet, which this pipeline is not made"),
        ("model_index.json", {"scheduler": ["evil", "Evil"]}, "names 'evil.Evil' as scheduler"),
        (CONFIG, {"quac__where": CATASTROPHE}, "unet.*: quac: where=.*regular expression"),
        (CONFIG, {"quac__quality": "contrique:/etc/passwd"}, "names a file of this machine"),
        (CONFIG, {"quac": 5}, "quac: must be options by name, got int"),
        (CONFIG, {"layers_per_block": 10**9}, "layers_per_block: 1000000000 is more than any network"),
        (CONFIG, {"layers_per_block": 100_000}, "asks for a network far larger than its weights"),
        (CONFIG, {"block_out_channels": [4096, 8192]}, "asks for a network far larger than its weights"),
    ],
)
def test_the_config_of_a_pipeline_asks_for_nothing_that_takes_time_or_files(name, values, message, hub, restorer):
    hub.add("me/restorer", changed(restorer, name, **values))
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        loaded()
    assert time.process_time() - start < 20


def test_a_network_in_several_files(hub, restorer):
    tensors = load(restorer[WEIGHTS])
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    shards = {f"unet/{file}": save({n: tensors[n] for n in held}, {"format": "pt"}) for file, held in halves.items()}
    index = {"metadata": {}, "weight_map": {name: file for file, held in halves.items() for name in held}}
    listed = f"{WEIGHTS}.index.json"
    hub.add("me/restorer", {CONFIG: restorer[CONFIG], **shards, listed: json.dumps(index).encode()})
    found = QuACUNet2DModel.from_pretrained("me/restorer", subfolder="unet").state_dict()
    assert all(torch.equal(found[name], tensors[name]) for name in names)
    index["weight_map"][names[0]] = "../../outside.safetensors"
    hub.add("me/restorer", {listed: json.dumps(index).encode()})
    with pytest.raises(ValueError, match="is no list of the files"):
        QuACUNet2DModel.from_pretrained("me/restorer", subfolder="unet")
