"""Configs: every key is checked before anything is built, and an error begins with its key."""

import pytest
import timm
import torch
from detectron2.config import get_cfg
from detectron2.modeling import FPN as FPNBackbone
from detectron2.modeling import build_backbone, build_model

import quac_plugins as quac
from quac_plugins.detectron2 import add_quac_config

FPN = "faster_rcnn_R_50_FPN_qacon"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.QUAC.QUALITY", "brisk", r"MODEL\.QUAC\.QUALITY: .*brisk.*brisque"),
        ("MODEL.QUAC.ACTIVATION", "qakon", r"MODEL\.QUAC\.ACTIVATION: .*did you mean 'qacon'"),
        ("MODEL.QUAC.NORM", "frozen", r"MODEL\.QUAC\.NORM: unknown norm 'frozen'"),
        ("MODEL.QUAC.REDUCTION", 0, r"MODEL\.QUAC\.REDUCTION: reduction must be a whole number"),
        ("MODEL.QUAC.INIT", "keep", r"MODEL\.QUAC\.INIT: unknown init 'keep'"),
        ("MODEL.QUAC.WHERE", "", r"MODEL\.QUAC\.WHERE: where must be a name"),
        ("MODEL.QUAC.HEADS", "all", r"MODEL\.QUAC\.HEADS: .*need MODEL.META_ARCHITECTURE 'QuACGeneralizedRCNN'"),
        ("MODEL.QUAC.PRIOR.FDM", "heavy", r"MODEL\.QUAC\.PRIOR\.FDM: .*heavy.*light"),
        ("MODEL.QUAC.PRIOR.EXPERTS", ["fog", "fog"], r"MODEL\.QUAC\.PRIOR\.EXPERTS: .*different names"),
        ("INPUT.FORMAT", "YUV-BT.601", r"INPUT\.FORMAT 'YUV-BT.601'"),
        ("MODEL.PIXEL_MEAN", ["a", 1.0, 1.0], r"^MODEL\.PIXEL_MEAN: "),
        ("MODEL.PIXEL_STD", [1.0, 1.0], r"^MODEL\.PIXEL_STD: must be 3 numbers above 0, as many as MODEL\.PIXEL_MEAN"),
        ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0], r"^MODEL\.PIXEL_STD: must be 3 numbers above 0"),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_built(key, value, message, config, monkeypatch):
    monkeypatch.setattr("quac_plugins.detectron2.backbones._resnet", lambda *_: pytest.fail("built"))
    cfg = config(FPN, {"MODEL.QUAC.PRIOR.ENABLED": True, key: value})
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)


def test_unknown_keys_and_other_types_are_detectron2s_own_errors():
    cfg = get_cfg()
    add_quac_config(cfg)
    with pytest.raises(AssertionError, match=r"Non-existent key: MODEL\.QUAC\.QUALITI"):
        cfg.merge_from_list(["MODEL.QUAC.QUALITI", "brisque"])
    with pytest.raises(ValueError, match="Type mismatch"):
        cfg.merge_from_list(["MODEL.QUAC.REDUCTION", "many"])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (FPN, "MODEL.QUAC.WHERE"),
        (FPN, "MODEL.QUAC.PRIOR.SITE"),
        ("mask_rcnn_R_50_FPN_heads_qacon", "MODEL.QUAC.HEADS"),
        ("faster_rcnn_timm_FPN_qacon", "MODEL.QUAC.WHERE"),
    ],
)
def test_a_site_that_is_not_there_is_named_with_its_key_and_the_host_is_built_once(name, key, config, monkeypatch):
    built, original = [], FPNBackbone.__init__

    def note(self, *args, **kwargs):
        built.append(torch.empty(0).device.type)
        original(self, *args, **kwargs)

    monkeypatch.setattr(FPNBackbone, "__init__", note)
    changes = {"MODEL.QUAC.PRIOR.ENABLED": True, "MODEL.QUAC.TIMM.PRETRAINED": False}
    cfg = config(name, {**changes, key: "box_head.res9.*"})
    with pytest.raises(ValueError, match=rf"^{key}: .*box_head\.res9\.\*"):
        build_model(cfg)
    assert built == ["cpu"]


def test_a_config_without_the_keys_says_what_to_call():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_quac_resnet_backbone"
    with pytest.raises(KeyError, match="add_quac_config"):
        build_backbone(cfg)


def test_several_patterns_a_regular_expression_and_a_timm_name(config):
    cfg = config(FPN, {"MODEL.QUAC.WHERE": "bottom_up.res3.0.*, bottom_up.res5.1.act2"})
    names = [site.name for site in quac.injection_of(build_backbone(cfg)).sites]
    assert names == ["bottom_up.res3.0.act1", "bottom_up.res3.0.act2", "bottom_up.res5.1.act2"]
    cfg = config(FPN, {"MODEL.QUAC.WHERE": r"re:res[34]\.0\.act[1,2]"})
    assert len(quac.injection_of(build_backbone(cfg)).sites) == 4
    cfg = config("faster_rcnn_timm_FPN_qacon", {"MODEL.QUAC.TIMM.NAME": "resnet_50"})
    with pytest.raises(ValueError, match=r"MODEL\.QUAC\.TIMM: NAME: timm knows no 'resnet_50'"):
        build_backbone(cfg)


def test_other_colours_where_no_quality_is_computed(config):
    changes = {"INPUT.FORMAT": "YUV-BT.601", "MODEL.QUAC.ACTIVATION": "meta_acon"}
    assert quac.injection_of(build_backbone(config(FPN, changes))).sites
    changes = {"INPUT.FORMAT": "YUV-BT.601", "MODEL.QUAC.ENABLED": False, "MODEL.QUAC.PRIOR.ENABLED": True}
    assert quac.injection_of(build_backbone(config(FPN, changes))).prior.sites
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT 'YUV-BT.601'"):
        build_backbone(config(FPN, {**changes, "MODEL.QUAC.PRIOR.EXPERTS": ["fog"]}))


def test_weights_of_timm_are_fetched_where_no_others_are_given(config, monkeypatch):
    asked, create = [], timm.create_model

    def note(name, **kwargs):
        asked.append(kwargs.get("pretrained", False))
        if asked[-1]:
            raise OSError("no network")
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", note)
    changes = {"MODEL.QUAC.TIMM.NAME": "test_convnext"}
    build_backbone(config("faster_rcnn_timm_FPN_qacon", {**changes, "MODEL.WEIGHTS": "my.pth"}))
    assert asked
    assert not any(asked)
    with pytest.raises(RuntimeError, match=r"^MODEL\.QUAC\.TIMM\.PRETRAINED: .*'test_convnext'.*\(no network\)"):
        build_backbone(config("faster_rcnn_timm_FPN_qacon", changes))


def test_neither_enabled_is_the_host_itself(config):
    cfg = config(FPN, {"MODEL.QUAC.ENABLED": False})
    model = build_model(cfg)
    assert quac.injection_of(model.backbone) is None
    assert not any("quac" in name for name, _ in model.named_modules())


def test_a_config_survives_dump_and_merge(tmp_path, config):
    cfg = config(FPN, {"MODEL.QUAC.QUALITY": "brisque_tone", "MODEL.QUAC.PRIOR.EXPERTS": ["fog"]})
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = config()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert again.MODEL.QUAC == cfg.MODEL.QUAC
    add_quac_config(again)  # a second call changes nothing
    assert again.MODEL.QUAC == cfg.MODEL.QUAC
