"""Every way through a network of timm sees a prior alike; benchmarks/timm_paths.py tries the other families."""

import sys
from pathlib import Path

import pytest
import timm
import torch

from quac_plugins import PriorConfig, inject, injection_of, load_adapter, save_adapter

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from timm_paths import check

WAYS = ["forward", "forward_features", "forward_intermediates", "features_only getter", "FeatureGetterNet"]


@pytest.mark.parametrize("name", ["test_byobnet", "test_efficientnet", "test_vit", "test_resnet"])
def test_every_way_sees_the_prior(name):
    row = check(name)
    assert row["problems"] == []
    assert {*WAYS, "FeatureGraphNet", "checkpointing"} <= set(row["ways"])


def test_an_adapter_of_the_container_still_loads(tmp_path, normalized):
    """As they were saved when the last stage's site was the list of all stages."""
    torch.manual_seed(0)
    host = timm.create_model("test_byobnet").eval()
    state, images = host.state_dict(), normalized(1, 64)
    inject(host, PriorConfig(site=["stages.0", r"re:^stages\Z"]))
    assert [site.name for site in injection_of(host).prior.sites] == ["stages.0", "stages"]
    with torch.no_grad():
        host.stages.quac_prior.body[-1].bias.fill_(0.3)
        expected = host(images)
    save_adapter(host, tmp_path)
    for name in ("test_byobnet", "test_byobnet_ddp"):
        fresh = timm.create_model(name).eval()
        fresh.load_state_dict(state, strict=False)
        load_adapter(fresh, tmp_path)
        assert torch.equal(fresh(images), expected)


def test_a_layer_that_is_also_called_past_its_hooks_is_warned_of():
    with pytest.warns(UserWarning, match="'blocks.0' by PreXceptionModule.forward_with_tap.*goes round the prior"):
        timm.create_model("xception41p_ddp", num_classes=2)
