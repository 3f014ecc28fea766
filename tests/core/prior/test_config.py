"""The config of a prior: what cannot be is refused with what can, and JSON gives it back."""

import json

import pytest

from quac_plugins import PriorConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": ""}, "site must be"),
        ({"site": []}, "site must be"),
        ({"site": [3]}, "site must be"),
        ({"site": {"layer1": 1}}, "site must be"),
        ({"fdm": "lite"}, "unknown FDM 'lite'; did you mean 'light'"),
        ({"fdm": 3}, "unknown FDM 3"),
        ({"fdm_width": 0}, "fdm_width must be a whole number from 1"),
        ({"fdm_width": 10**30}, "fdm_width must be a whole number"),
        ({"fdm_width": True}, "fdm_width must be"),
        ({"fdm_width": 32.0}, "fdm_width must be"),
        ({"fdm_act": "rely"}, "unknown fdm_act 'rely'; did you mean 'relu'"),
        ({"fdm_act": ["relu"]}, "unknown fdm_act"),
        ({"experts": "fog"}, "experts must be a list of names"),
        ({"experts": 3}, "experts must be a list of names"),
        ({"experts": None}, "experts must be a list of names"),
        ({"experts": {"fog": 1}}, "experts must be a list of names"),
        ({"experts": ["fog", ""]}, "experts must be a list of names"),
        ({"experts": ["fog", 3]}, "experts must be a list of names"),
        ({"experts": ["fog", "fog"]}, "at most 256 different names"),
        ({"experts": [str(i) for i in range(257)]}, "at most 256 different names"),
        ({"experts": ["fog"], "fdm_act": "qacon"}, "fdm_act='qacon' needs q"),
        ({"top_k": 0}, "top_k must be a whole number ≥ 1"),
        ({"top_k": "1"}, "top_k must be"),
        ({"freeze": "no"}, "freeze must be True or False"),
        ({"quality_grad": 1}, "quality_grad must be True or False"),
        ({"quality_channels": 0}, "quality_channels must be"),
        ({"channel_order": "grb"}, "unknown channel_order 'grb'"),
        ({"mean": (0.5,)}, "mean and std go together"),
        ({"mean": "12", "std": (1.0,)}, "mean must be a number"),
        ({"mean": [10**400], "std": [1.0]}, "mean must be a number"),
        ({"mean": [float("nan")], "std": [1.0]}, "mean must be a number"),
        ({"mean": [0.5], "std": [0.0]}, "std must be positive"),
        ({"mean": [0.5], "std": [1.0, 1.0]}, "as many numbers"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        PriorConfig(**options)


def test_a_quality_that_is_neither_a_name_nor_a_function():
    with pytest.raises(TypeError, match="quality must be a name or a callable"):
        PriorConfig(quality=3)


def test_what_reads_q():
    assert not PriorConfig().needs_quality
    assert not PriorConfig(fdm_act="acon").needs_quality
    assert PriorConfig(fdm_act="qswish").needs_quality
    assert PriorConfig(experts=["fog"]).needs_quality


def test_json_gives_it_back(cheap):
    config = PriorConfig(
        site=("layer1", "re:^layer2$"), fdm="ncrf", fdm_width=16, experts=("fog", "snow"), top_k=2,
        quality="brisque", mean=0.5, std=[0.25], freeze=False,
    )  # fmt: skip
    again = PriorConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.patterns == ["layer1", "re:^layer2$"]
    assert (again.mean, again.std) == ((0.5,), (0.25,))
    own = PriorConfig.from_dict(PriorConfig(quality=cheap).to_dict())
    assert own.has_own_quality
    assert own.quality == "callable:channel_statistics"
    assert PriorConfig.from_dict({"quality": "contrique:/some/file"}).quality == "contrique"
    with pytest.raises(ValueError, match="unknown fields of PriorConfig: colour"):
        PriorConfig.from_dict({"colour": "red"})


def test_each_module_goes_where_it_is_meant_to():
    assert PriorConfig().site == "stages"
    assert PriorConfig(fdm="margin").site == "norms"
    assert PriorConfig(fdm="margin", site="stages").site == "stages"
