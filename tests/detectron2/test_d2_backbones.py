"""Backbones: a preserved one is detectron2's own, bit for bit, for every kind of host."""

import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, instantiate
from detectron2.modeling.backbone import FPN, MViT, ResNet, SimpleFeaturePyramid, SwinTransformer, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem

import quac_plugins as quac
from quac_plugins.core.quality.padding import note_sizes
from quac_plugins.detectron2 import TimmBackbone, with_quac

MEAN, STD = [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]
CONFIGS = {
    "build_resnet_backbone": "faster_rcnn_R_50_C4_qacon",
    "build_resnet_fpn_backbone": "faster_rcnn_R_50_FPN_qacon",
    "build_retinanet_resnet_fpn_backbone": "retinanet_R_50_FPN_qacon",
}


@pytest.mark.parametrize(
    ("own", "name", "depth"),  # detectron2's C4 heads are made of bottlenecks, for ResNet-50 and deeper
    [(*pair, depth) for pair in CONFIGS.items() for depth in (18, 50) if not ("C4" in pair[1] and depth == 18)],
)
def test_a_preserved_resnet_is_detectron2s_own(own, name, depth, config, build, inputs):
    deep = {"MODEL.RESNETS.DEPTH": depth, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if depth == 18 else 256}
    ours = build(config(name, deep))
    plain = build(config(name, {**deep, "MODEL.BACKBONE.NAME": own}))
    loaded = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all("act" in key for key in loaded.missing_keys)
    record = quac.injection_of(ours.backbone)
    assert record.tap.endswith("stem.conv1")
    assert all(site.name.rpartition(".")[2].startswith("act") for site in record.sites)
    images = plain.preprocess_image(inputs())
    with torch.no_grad():
        expected, found = plain.backbone(images.tensor), ours.backbone(ours.preprocess_image(inputs()).tensor)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert ours.backbone.output_shape() == plain.backbone.output_shape()


def test_a_checkpoint_of_the_model_zoo_loads(tmp_path, config, build):
    """As the zoo's pickles are: names of detectron2, or shorter ones that are matched by their ends."""
    plain = build(config("faster_rcnn_R_50_FPN_qacon", {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone"}))
    whole = {name: tensor.numpy() for name, tensor in plain.state_dict().items()}
    bare = {name.removeprefix("backbone.bottom_up."): v for name, v in whole.items() if "bottom_up" in name}
    for content in (
        {"model": whole, "__author__": "zoo"},
        {"model": bare, "__author__": "zoo", "matching_heuristics": True},
    ):
        (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content))
        ours = build(config("faster_rcnn_R_50_FPN_qacon"))
        with torch.no_grad():
            for parameter in ours.backbone.bottom_up.parameters():
                parameter.fill_(0.5)
        DetectionCheckpointer(ours).load(str(tmp_path / "R-18.pkl"))
        state = ours.state_dict()
        for name, value in whole.items():
            if "bottom_up" in name or content["model"] is whole:
                assert torch.equal(state[name], torch.from_numpy(value)), name


def pyramid(bottom_up, names):
    return FPN(bottom_up, names, 32)


HOSTS = {
    "resnet": lambda: ResNet(BasicStem(), ResNet.make_default_stages(18), out_features=["res3", "res5"]),
    "swin": lambda: pyramid(
        SwinTransformer(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 6), drop_path_rate=0.0),
        ["p0", "p1", "p2", "p3"],
    ),
    "vitdet": lambda: SimpleFeaturePyramid(
        ViT(img_size=128, embed_dim=48, depth=2, num_heads=2, window_size=4, out_feature="last_feat"),
        in_feature="last_feat", out_channels=32, scale_factors=(2.0, 1.0, 0.5), top_block=LastLevelMaxPool(),
        norm="LN", square_pad=128,
    ),
    "mvit": lambda: pyramid(
        MViT(embed_dim=32, depth=4, num_heads=1, last_block_indexes=(0, 1, 2, 3), residual_pooling=True,
             drop_path_rate=0.0, adaptive_kv_stride=4),
        ["scale2", "scale3", "scale4", "scale5"],
    ),
    "timm": lambda: pyramid(TimmBackbone("convnext_atto", ["res2", "res3", "res4", "res5"]), ["res2", "res5"][:1]),
    "timm, channels last": lambda: pyramid(
        TimmBackbone("swin_tiny_patch4_window7_224", ["res2", "res3"], strict_img_size=False, depths=(1, 1, 1, 1)),
        ["res2", "res3"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_any_backbone_by_injection(host, photographs):
    torch.manual_seed(0)
    backbone = HOSTS[host]().eval()
    rgb = (photographs(2, 128) * 255).round()
    images = (rgb.flip(1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        before = backbone(images)
        with_quac(backbone, MEAN, STD, quac={"where": "auto"}, prior={"site": "stages"})
        after = backbone(images)
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    record = quac.injection_of(backbone)
    assert record.sites
    assert record.prior.sites
    q = backbone.get_submodule(record.tap).quac_tap.context._local.forward.q
    assert torch.allclose(q, quac.brisque(rgb / 255), rtol=1e-3, atol=1e-3)


def test_a_lazy_config(photographs):
    node = LazyCall(with_quac)(
        backbone=LazyCall(ResNet)(
            stem=LazyCall(BasicStem)(),
            stages=LazyCall(ResNet.make_default_stages)(depth=18),
            out_features=["res4"],
        ),
        pixel_mean=MEAN,
        pixel_std=STD,
        quac={"where": ["res4.*.act1", "res3.0.*"], "quality": "brisque_tone"},
    )
    backbone = instantiate(node)
    names = [site.name for site in quac.injection_of(backbone).sites]
    assert names == ["res3.0.act1", "res3.0.act2", "res4.0.act1", "res4.1.act1"]
    assert backbone(photographs(1, 64))["res4"].shape == (1, 256, 4, 4)


def test_a_timm_network_that_is_not_there_or_has_no_such_stride():
    with pytest.raises(ValueError, match="timm knows no 'resnet_fifty'"):
        TimmBackbone("resnet_fifty", ["res2"])
    for name in ("resnet18_qacon", "resnet18_ddp", "resnet18_qacon_ddp"):
        with pytest.raises(ValueError, match=rf"NAME: '{name}' holds QuAC .* the network itself, 'resnet18'"):
            TimmBackbone(name, ["res2"])
    with pytest.raises(ValueError, match="none for res7"):
        TimmBackbone("resnet18", ["res2", "res7"])


def test_a_swin_on_its_own_which_misspells_its_divisibility(photographs):
    backbone = with_quac(SwinTransformer(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 6)), MEAN, STD, quac={})
    assert quac.injection_of(backbone).sites
    assert set(backbone(photographs(1, 64))) == {"p0", "p1", "p2", "p3"}


def test_a_swin_on_its_own_pads_inside_and_q_is_of_the_image_before(photographs):
    swin = SwinTransformer(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 6))
    backbone = with_quac(swin, [0.0] * 3, [255.0] * 3, channel_order="RGB", quac={"where": "all"})
    images = photographs(2, 99)
    padded = torch.nn.functional.pad(images, (0, 2, 0, 1))
    note_sizes(padded, [(99, 99), (99, 99)])
    backbone(padded)
    assert quac.injection_of(backbone).tap == "patch_embed"
    q = backbone.patch_embed.quac_tap.context._local.forward.q
    assert torch.allclose(q, quac.brisque(images), rtol=1e-4, atol=1e-4)


def test_a_plain_network_of_torch(photographs):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    assert with_quac(network, MEAN, STD, quac={})(photographs(1, 64)).shape == (1, 8, 62, 62)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quac": {"quality": "brisk"}}, r"^quac\.quality: unknown quality function 'brisk'; did you mean 'brisque'"),
        ({"quac": {"qualty": "brisque"}}, r"^quac\.qualty: unknown option 'qualty'; did you mean 'quality'"),
        ({"quac": {"norm": 3}}, r"^quac\.norm: unknown norm 3"),
        ({"prior": {"fdm": "heavy"}}, r"^prior\.fdm: "),
        ({"prior": {"sites": "auto"}}, r"^prior\.sites: unknown option 'sites'; did you mean 'site'"),
        ({"quac": {}, "pixel_std": [1.0, 1.0]}, r"^pixel_std: must be 3 numbers above 0"),
        ({"quac": {}, "pixel_mean": "grey"}, r"^pixel_mean: "),
        ({"quac": {}, "channel_order": "YUV"}, r"^channel_order: unknown format 'YUV'"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    resnet = ResNet(BasicStem(), ResNet.make_default_stages(18))
    with pytest.raises(ValueError, match=message):
        with_quac(resnet, **{"pixel_mean": MEAN, "pixel_std": STD, **options})


def test_channels_last_maps_as_wide_as_they_are_high(photographs):
    """96 channels at 96×96: only the network itself knows which axis is which."""
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", ["res2"], depths=(1, 1, 1, 1)).eval()
    images = photographs(1, 384)
    with torch.no_grad():
        assert torch.equal(backbone(images)["res2"], backbone.net(images)[0].permute(0, 3, 1, 2))


def test_options_of_a_lazy_config_as_nodes_of_its_own(photographs):
    node = LazyCall(with_quac)(
        backbone=LazyCall(ResNet)(stem=LazyCall(BasicStem)(), stages=LazyCall(ResNet.make_default_stages)(depth=18)),
        pixel_mean=MEAN, pixel_std=STD, quac=LazyCall(quac.QuACConfig)(where=["res4.*", "res5.*"]),
        prior=LazyCall(quac.PriorConfig)(site="auto", experts=["fog"]),
    )  # fmt: skip
    record = quac.injection_of(instantiate(node))
    assert len(record.sites) == 8
    assert record.prior.config.experts == ["fog"]
    with pytest.raises(ValueError, match=r"^quac\.where: "):
        with_quac(ResNet(BasicStem(), ResNet.make_default_stages(18)), MEAN, STD, quac={"where": "layer9.*"})


def test_frozen_stages_take_no_activation_that_learns(config, build):
    changes = {"MODEL.QUAC.WHERE": "all", "MODEL.BACKBONE.FREEZE_AT": 2, "MODEL.QUAC.PRIOR.ENABLED": True}
    backbone = build(config("faster_rcnn_R_50_FPN_qacon", changes)).backbone.bottom_up
    inside = {n: p.requires_grad for n, p in backbone.named_parameters() if ".fc3." in n}
    assert {grad for name, grad in inside.items() if name.startswith(("stem.", "res2."))} == {False}
    assert {grad for name, grad in inside.items() if name.startswith(("res3.", "res5."))} == {True}
    prior = [p.requires_grad for n, p in backbone.named_parameters() if "quac_prior" in n]
    assert prior
    assert all(prior)
    frozen = ResNet(BasicStem(), ResNet.make_default_stages(18)).requires_grad_(False)
    with_quac(frozen, MEAN, STD, quac={"where": "all"})  # a host that is frozen as a whole is there for these to learn
    assert all(p.requires_grad for n, p in frozen.named_parameters() if ".fc3." in n)


def test_margins_go_behind_the_frozen_norms(config, build):
    changes = {"MODEL.QUAC.ENABLED": False, "MODEL.QUAC.PRIOR.ENABLED": True, "MODEL.QUAC.PRIOR.FDM": "margin"}
    model = build(config("faster_rcnn_R_50_FPN_qacon", {**changes, "MODEL.QUAC.PRIOR.EXPERTS": ["fog", "contrast"]}))
    backbone = model.backbone.eval()
    sites = [site.name for site in quac.injection_of(backbone).prior.sites]
    norms = {n for n, m in backbone.named_modules() if type(m).__name__ == "FrozenBatchNorm2d"}
    assert set(sites) == norms
    images = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        before = backbone(images)["p5"]
        for name, parameter in backbone.named_parameters():
            if name.endswith("quac_prior.table"):
                parameter.fill_(0.1)
        fog, clean = torch.zeros(2, 1, 17)
        fog[0, 10], fog[0, 16], clean[0, 0] = 1, 3, 1
        with quac.use_q(backbone, clean):
            torch.testing.assert_close(backbone(images)["p5"], before, atol=1e-3, rtol=1e-3)
        with quac.use_q(backbone, fog):
            assert not torch.allclose(backbone(images)["p5"], before, atol=1e-2)


def test_images_with_depth():
    resnet = ResNet(BasicStem(in_channels=4), ResNet.make_default_stages(18))
    with_quac(resnet, [*MEAN, 100.0], [*STD, 50.0], quac={})
    tap = resnet.stem.conv1.quac_tap
    assert tap.mean == pytest.approx(tuple(v / 255 for v in MEAN))
    assert resnet(torch.rand(1, 4, 64, 64))["res5"].shape[1] == 512
