"""Models of transformers with QuAC inside keep it through save_pretrained, from_pretrained, the Trainer and the Hub."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, ViTConfig
from transformers import ViTForImageClassification as ViT

import quac_plugins as quac
from quac_plugins.transformers import QuACResNetForImageClassification as QuACResNet
from quac_plugins.transformers import QuACViTForImageClassification as QuACViT
from quac_plugins.transformers import quac_class

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
QUAC = {"activation": "qgelu", "where": "all", "norm": "layer", **HALF}


@pytest.fixture
def model(moved):
    return moved(QuACViT(ViTConfig(**SIZES, quac=QUAC))).eval()


@pytest.fixture
def images(photographs):
    return 2 * photographs(2, 64) - 1


def same(model, other, images):
    with torch.no_grad():
        return torch.equal(model(images).logits, other.eval()(images).logits)


def test_what_is_inside_is_kept_by_saving_and_loading(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quac"]["activation"] == "qgelu"
    again = QuACViT.from_pretrained(tmp_path)
    assert type(again) is QuACViT
    assert same(model, again, images)
    again, told = QuACViT.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert same(model, copy.deepcopy(again), images)
    plain = quac.remove(again)
    assert type(plain) is ViT
    assert not hasattr(plain.config, "quac")


def test_a_host_of_the_hub_starts_as_it_was(images, tmp_path):
    host = ViT(ViTConfig(**SIZES)).eval()
    host.save_pretrained(tmp_path)
    model = QuACViT.from_pretrained(tmp_path, quac=QUAC)
    assert len(quac.injection_of(model).sites) == 2
    with torch.no_grad():
        assert torch.allclose(model(images).logits, host(images).logits, atol=1e-6)
    with pytest.raises(TypeError, match="QuACResNetForImageClassification is made of a ResNetForImageClassification"):
        QuACResNet.from_host(host)


def test_a_prior_that_was_fitted_is_kept(images, photographs, tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5}
    host = ResNetForImageClassification(ResNetConfig(**sizes)).eval()
    pictures = [image.permute(1, 2, 0).numpy() for image in photographs(3, 64)]
    options = {"corruptions": ["contrast", "fog"], "steps": 0, "views": 1, "draws": 1, "input_size": 64}
    quac.fit_prior(host, pictures, progress=False, **HALF, **options)
    model = QuACResNet.from_host(host)
    model.save_pretrained(tmp_path)
    again = QuACResNet.from_pretrained(tmp_path)
    assert quac.injection_of(again).prior.config.experts == ["contrast", "fog"]
    assert same(model, again, images)


def test_the_trainer_trains_it_and_goes_on_from_its_checkpoint(model, images, tmp_path):
    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"pixel_values": images[index % 2], "labels": index % 2}

    quiet = {"report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 2, "save_steps": 1}
    before = {name: tensor.clone() for name, tensor in quac.adapter_state(model).items()}
    settings = TrainingArguments(str(tmp_path), max_steps=2, **quiet)
    Trainer(model, settings, train_dataset=Pictures()).train()
    after = quac.adapter_state(model)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    again = QuACViT.from_pretrained(tmp_path / "checkpoint-1")
    Trainer(again, settings, train_dataset=Pictures()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.allclose(tensor, after[name]) for name, tensor in quac.adapter_state(again).items())


def test_a_whole_model_travels_over_the_hub(model, images, hub):
    pushed = quac.push(model, "me/vit", whole=True, license="apache-2.0")
    assert set(pushed.files) == {"README.md", "config.json", "model.safetensors"}
    card = hub.files("me/vit")["README.md"].decode()
    assert 'QuACViTForImageClassification.from_pretrained("me/vit")' in card
    assert "library_name: transformers" in card
    assert same(model, QuACViT.from_pretrained("me/vit"), images)
    with pytest.raises(ValueError, match=r"quac_class\(type\(model\)\)\.from_host\(model\)\), got ViTForImage"):
        quac.push(ViT(ViTConfig(**SIZES)), "me/vit", whole=True)


def test_what_nobody_could_load_or_should_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was saved with QuAC inside \(quac\); load it without quac="):
        QuACViT.from_pretrained(tmp_path, quac=QUAC)
    weights = load_file(tmp_path / "model.safetensors")
    fewer = {name: tensor for name, tensor in weights.items() if ".fc3." not in name}
    save_file(fewer, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights of 'vit\..*fc3\.bias' and 3 others, where its config puts"):
        QuACViT.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quac"]["where"] = "re:(a+)+b"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quac: where=.* is a regular expression"):
        QuACViT.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="Linear is no model of transformers"):
        quac_class(torch.nn.Linear)
    with pytest.raises(ValueError, match=r"quac\.activation: unknown activation 'qgeluu'"):
        QuACViT(ViTConfig(**SIZES, quac={"activation": "qgeluu"}))
