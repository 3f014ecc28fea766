"""Cards: what they say is what is in the files, and figures come from reports alone."""

import copy
import json
import re
import warnings

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import quac_plugins as quac
from quac_plugins.evaluate import EvaluationReport
from quac_plugins.evaluate.lending import describe_network
from quac_plugins.hub.card import read_metrics


def report(shift=0.0, names=("fog", "contrast"), severities=("3", "5")):
    def score(value):
        return {"top1": value + shift, "top5": 90.0, "n": 40}

    corruptions = {n: {s: score(40.0 + 10 * i - int(s)) for s in severities} for i, n in enumerate(names)}
    given = {"checkpoint": {"path": "/home/someone/a.pt", "sha256": "ab12"}, "adapter": {"name": "/home/someone/fog"}}
    kept = {"images": ["birthday/someone.jpg"], "targets": [0], "predicted": {"clean": [0]}, "rank": {"clean": [1]}}
    found = EvaluationReport("test_resnet", score(80.0), corruptions, data="/home/someone/photographs", seed=1)
    found.network, found.outcomes = {"given": given}, kept
    return found


@pytest.fixture
def model():
    model = quac.inject(timm.create_model("test_resnet").eval(), quac.PriorConfig(site="stages"))
    with torch.no_grad():
        for tensor in quac.adapter_state(model).values():
            tensor.add_(0.01)
    return model


def card_of(model, folder, **options):
    quac.push(model, "me/adapter", dry_run=folder, **options)
    return ModelCard.load(folder / "README.md")


def test_figures_with_deviations_of_several_seeds(model, tmp_path):
    card = card_of(model, tmp_path, metrics=[report(), report(1.0), report(2.0)])
    assert "| clean |  | 81.0 ± 1.0 | 40 |" in card.text
    assert "| fog | 3 | 38.0 ± 1.0 | 40 |" in card.text
    assert "| contrast | 5 | 46.0 ± 1.0 | 40 |" in card.text
    clean, mean = card.data.eval_results
    assert (clean.metric_value, clean.metric_args) == (81.0, {"runs": 3, "std": 1.0})
    assert mean.metric_value == pytest.approx(42.0)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert [run["clean"]["top1"] for run in found] == [80.0, 81.0, 82.0]
    assert found[0]["network"]["given"]["checkpoint"] == {"path": "a.pt", "sha256": "ab12"}
    assert "someone" not in (tmp_path / "metrics.json").read_text() + card.content


def measured(model):
    """The report as an evaluation of the model makes it."""
    found = report()
    found.network["inside"] = describe_network(model)["inside"]
    found.network["weights"], found.preprocessing = "ab12cd", {"input_size": [3, 64, 64], "mean": [0.5] * 3}
    return found


def test_figures_are_of_what_is_pushed(model, tmp_path):
    mine, bare = measured(model), report()
    bare.network["inside"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card = card_of(model, tmp_path / "mine", metrics=mine)
        half = quac.save_adapter(model, tmp_path / "half", dtype=torch.float16)
        loaded = quac.load_adapter(copy.deepcopy(model), half)  # in float32 again
        card_of(half, tmp_path / "sent", metrics=measured(loaded))
    assert "64×64, mean 0.5; photographs, seed 1.\n" in card.text
    with pytest.warns(UserWarning, match=r"the figures are of test_resnet.*none of them of the adapter that is pushed"):
        card_of(model, tmp_path / "bare", metrics=bare)
    with pytest.raises(ValueError, match=r"not runs of one thing .with nothing inside, with prior"):
        card_of(model, tmp_path / "both", metrics=[bare, mine])
    other = measured(model)
    other.preprocessing["mean"], other.limit = [0.4] * 3, 20
    with pytest.raises(ValueError, match=r"no limit, limit 20; mean 0.5, mean 0.4"):
        card_of(model, tmp_path / "other", metrics=[mine, other])


def test_every_number_of_the_card_is_in_a_file(model, tmp_path):
    images = [torch.rand(3, 64, 64) for _ in range(3)]
    fit = quac.fit_prior(model, images, corruptions="contrast", steps=4, views=1, input_size=64)
    fit.to_json(tmp_path / "fit.json")
    report().to_json(tmp_path / "metrics.json")
    card = card_of(model, tmp_path / "sent", metrics=tmp_path / "metrics.json", fit=tmp_path / "fit.json")
    assert f"{fit.parameters} parameters" in card.text
    assert "On 3 images without labels, 1 of them held out" in card.text
    assert "±" not in card.text.partition("## Figures")[2]
    known = json.dumps([json.loads((tmp_path / n).read_text()) for n in ("fit.json", "metrics.json")])
    for figure in re.findall(r"\| \w+ \| \d? \| ([\d.]+) \|", card.text):
        assert figure in known


def test_without_figures_nothing_is_claimed(model, tmp_path):
    card = card_of(model, tmp_path)
    assert "nothing is claimed" in card.text
    assert card.data.eval_results is None
    assert not (tmp_path / "metrics.json").exists()


def test_what_is_inside_and_the_hosts_very_weights(model, tmp_path):
    card = card_of(model, tmp_path, license="mit", base_model="timm/test_resnet.r160_in1k", description="For fog.")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["host"]["fingerprint"] in card.text
    assert all(f"`{site['name']}`" in card.text for site in config["prior"]["sites"])
    assert (card.data.license, card.data.base_model) == ("mit", "timm/test_resnet.r160_in1k")
    assert card.data.library_name == "quac-plugins"
    assert "For fog." in card.text
    assert 'quac.load_adapter(model, "me/adapter")' in card.text
    assert "base_model" not in card_of(model, tmp_path / "other").content


def test_reports_that_are_none(model, tmp_path):
    with pytest.raises(ValueError, match="different corruptions or severities"):
        quac.push(model, "me/adapter", metrics=[report(), report(names=("fog",))], dry_run=tmp_path)
    (tmp_path / "other.json").write_text('{"top1": 3}')
    with pytest.raises(ValueError, match=r"other.json is not the JSON of an evaluation"):
        quac.push(model, "me/adapter", metrics=tmp_path / "other.json", dry_run=tmp_path)
    with pytest.raises(ValueError, match=r"other.json is not the JSON of a fit"):
        quac.push(model, "me/adapter", fit=tmp_path / "other.json", dry_run=tmp_path)
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "none.json")
    with pytest.raises(ValueError, match="holds no figures"):
        read_metrics(EvaluationReport("x"))
