"""QuACUNet2DModel and its like: the host itself at the start, saved and loaded as every network of diffusers."""

import copy
import json
import pickle

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file

import quac_plugins as quac
from quac_plugins.diffusers import QuACUNet2DConditionModel, QuACUNet2DModel, add_to_model, models, quac_class
from quac_plugins.diffusers.blocks import ActGroupNorm, EmbeddingActivation, with_activations

SAMPLE, Q = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 36)


def out(model, timestep=5, q=Q, sample=SAMPLE):
    with torch.no_grad():
        return model(sample, timestep, q=q).sample


CONDITIONAL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}


@pytest.mark.parametrize("where", ["auto", "all", "spatial"])
@pytest.mark.parametrize("scaling", ["default", "scale_shift"])
def test_at_the_start_it_is_its_host(where, scaling, plain):
    host = plain(resnet_time_scale_shift=scaling)
    with torch.no_grad():
        expected = host(SAMPLE, 5).sample
    names = set(host.state_dict())
    model = add_to_model(copy.deepcopy(host), {"where": where})
    assert isinstance(model, (QuACUNet2DModel, UNet2DModel))
    assert names <= set(model.state_dict())
    assert torch.equal(out(model), expected)
    assert quac.injection_of(model).tap == "conv_in"


def test_blocks_have_an_activation_for_each_place_and_compute_what_they_did(plain):
    host = plain()
    before = set(host.state_dict())
    with torch.no_grad():
        expected = host(SAMPLE, 5).sample
        assert torch.equal(with_activations(with_activations(host))(SAMPLE, 5).sample, expected)
    assert set(host.state_dict()) == before
    block = host.down_blocks[0].resnets[0]
    assert type(block.norm1) is type(block.norm2) is ActGroupNorm
    assert isinstance(block.nonlinearity, EmbeddingActivation)
    assert not isinstance(block.nonlinearity.embedding, EmbeddingActivation)


def test_all_means_every_activation_on_feature_maps(unet):
    sites = {site.name for site in quac.injection_of(unet({"where": "all"})).sites}
    model = unet({"where": "all"})
    norms = {f"{name}.act" for name, module in model.named_modules() if isinstance(module, ActGroupNorm)}
    assert sites == norms | {"conv_act"}


def test_q_decides_and_each_image_has_its_own(unet):
    model = unet({"where": "all"})
    both = out(model)
    assert not torch.allclose(both, out(model, q=Q.flip(0)), atol=1e-4)
    alone = out(model, q=Q[1:], sample=SAMPLE[1:])
    torch.testing.assert_close(both[1:], alone)
    with torch.no_grad(), quac.use_q(model, Q):
        assert torch.equal(model(SAMPLE, 5).sample, both)


def test_without_quality_it_says_what_to_do(unet):
    with pytest.raises(quac.QualityError, match=r"'conv_in' sees no degraded images .* must be given"):
        unet()(SAMPLE, 5)
    with pytest.raises(ValueError, match="q has shape"):
        unet()(SAMPLE, 5, q=Q[:, :7])
    with pytest.raises(ValueError, match="the given q has batch 2, the images have batch 4"):
        unet()(SAMPLE.repeat(2, 1, 1, 1), 5, q=Q)


@pytest.mark.parametrize(("order", "q"), [("tile", Q.repeat(2, 1)), ("interleave", Q.repeat_interleave(2, 0))])
def test_a_multiple_of_the_batch_is_expanded_as_told(order, q, unet):
    model, sample = unet({"expand_q": order}), torch.rand(4, 3, 32, 32)
    assert torch.equal(out(model, sample=sample), out(model, sample=sample, q=q))
    with pytest.raises(ValueError, match="batch 2, the images have batch 3"):
        out(model, sample=sample[:3])


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"low_cpu_mem_usage": False}])
def test_saved_and_loaded_it_is_the_same_to_the_last_bit(options, unet, tmp_path):
    model = unet({"where": "all", "quality": "brisque_tone", "reduction": 8})
    q = torch.rand(2, 47)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "QuACUNet2DModel"
    assert config["quac"]["quality"] == "brisque_tone"
    again = QuACUNet2DModel.from_pretrained(tmp_path, **options)
    assert again.config["quac"] == model.config["quac"]
    assert torch.equal(out(again, q=q), out(model, q=q))


def test_a_plain_checkpoint_loads_and_computes_what_it_did(plain, tmp_path):
    host = plain()
    host.save_pretrained(tmp_path)
    model = QuACUNet2DModel.from_pretrained(tmp_path, quac={"where": "all"})
    assert type(model) is QuACUNet2DModel
    assert model.config["quac"]["where"] == "all"
    with torch.no_grad():
        torch.testing.assert_close(out(model), host(SAMPLE, 5).sample, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "quac")
    with pytest.raises(ValueError, match=r"was saved with QuAC inside.*load it without quac="):
        QuACUNet2DModel.from_pretrained(tmp_path / "quac", quac={"where": "all"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_variants(dtype, unet, tmp_path):
    model = unet()
    exact = out(model)
    model.to(dtype).save_pretrained(tmp_path, variant="half")
    again = QuACUNet2DModel.from_pretrained(tmp_path, variant="half", torch_dtype=dtype)
    assert again.dtype == dtype
    found = out(again, sample=SAMPLE.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant, unet):
    gradients = []
    for checkpointing in (False, True):
        model = unet({"where": "all"}).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        if checkpointing and reentrant:

            def recompute(module, *args):
                return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=True)

            for part in model.modules():
                if hasattr(part, "_gradient_checkpointing_func"):
                    part._gradient_checkpointing_func = recompute
        model(SAMPLE, 5, q=Q).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scaling", ["default", "scale_shift"])
@pytest.mark.parametrize("where", ["all", "last"])
def test_layerwise_casting_leaves_what_was_put_in(where, scaling, unet):
    model = unet({"where": where}, resnet_time_scale_shift=scaling)
    expected = out(model)
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert model.conv_in.weight.dtype == torch.float16
    assert {tensor.dtype for tensor in quac.adapter_state(model).values()} == {torch.float32}
    torch.testing.assert_close(out(model), expected, rtol=0, atol=0.01 * float(expected.abs().max()))
    assert model.conv_in.weight.dtype == torch.float16
    assert model._skip_layerwise_casting_patterns == UNet2DModel._skip_layerwise_casting_patterns


def test_layerwise_casting_of_everything(unet):
    """As ``apply_layerwise_casting`` does, which knows nothing of what was put in."""
    model = unet({"where": "all"})
    expected = out(model)
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.float8_e4m3fn in {tensor.dtype for tensor in quac.adapter_state(model).values()}
    torch.testing.assert_close(out(model), expected, rtol=0, atol=0.2 * float(expected.abs().max()))


def test_compiled_whole(unet):
    model = unet()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(SAMPLE, 5, q=Q).sample, out(model))
        torch.testing.assert_close(compiled(SAMPLE, 5, q=Q.flip(0)).sample, out(model, q=Q.flip(0)))


def test_attention_processors_are_the_hosts(unet, plain):
    def processors(model):
        return {name: type(module.processor) for name, module in model.named_modules() if hasattr(module, "processor")}

    assert processors(unet()) == processors(plain())
    model = unet()
    expected = out(model)
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    torch.testing.assert_close(out(model), expected)


def test_removed_it_is_its_host_again(plain, tmp_path):
    host = plain()
    with torch.no_grad():
        expected = host(SAMPLE, 5).sample
    config = dict(host.config)
    model = quac.remove(add_to_model(host))
    assert type(model) is UNet2DModel
    assert dict(model.config) == config
    with torch.no_grad():
        assert torch.equal(model(SAMPLE, 5).sample, expected)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(UNet2DModel.from_pretrained(tmp_path)(SAMPLE, 5).sample, expected)


def test_an_adapter_goes_into_another_copy_of_its_host(plain, unet, tmp_path):
    model = unet({"where": "all"})
    quac.save_adapter(model, tmp_path)
    host = quac.remove(copy.deepcopy(model))
    again = QuACUNet2DModel.from_adapter(host, tmp_path)
    assert again.config["quac"] == model.config["quac"]
    assert torch.equal(out(again), out(model))
    other = plain(layers_per_block=2)
    with pytest.warns(UserWarning, match="other weights"), pytest.raises(ValueError, match="does not fit"):
        QuACUNet2DModel.from_adapter(other, tmp_path)
    assert type(other) is UNet2DModel


def test_loading_info_and_a_quality_function_of_ones_own(plain, tmp_path, photographs):
    plain().save_pretrained(tmp_path / "plain")
    model, info = QuACUNet2DModel.from_pretrained(tmp_path / "plain", quac={}, output_loading_info=True)
    assert type(model) is QuACUNet2DModel
    assert not info["missing_keys"]

    def own(images):
        return images.mean(dim=(2, 3))

    torch.manual_seed(0)
    model = add_to_model(plain(), {"quality": own, "init": "paper"})
    model.save_pretrained(tmp_path / "own")
    again = QuACUNet2DModel.from_pretrained(tmp_path / "own", quac={"quality": own})
    q = own(photographs(2, 16))
    assert torch.equal(out(again, q=q), out(model, q=q))


def test_an_error_leaves_the_host_as_it_was(plain):
    host = plain()
    kinds = {name: type(module) for name, module in host.named_modules()}
    with pytest.raises(ValueError, match="matches no activation"):
        add_to_model(host, {"where": "nowhere"})
    assert {name: type(module) for name, module in host.named_modules()} == kinds
    quac.remove(add_to_model(host, {"where": "all"}))
    assert {name: type(module) for name, module in host.named_modules()} == kinds


def test_deepcopy_and_pickle(unet):
    model = unet()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is QuACUNet2DModel
        assert torch.equal(out(again), out(model))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_channels": 7, "num_class_embeds": 10},
        {"in_channels": 8},
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 60,
        },
        {"class_embed_type": "timestep"},
    ],
    ids=["text to image", "x4 upscaler", "InstructPix2Pix", "XL", "class by timestep"],
)
def test_conditional_networks(changes):
    model = QuACUNet2DConditionModel(**{**CONDITIONAL, **changes})
    assert quac.injection_of(model).tap == "conv_in"
    assert all("norm" in site.name or "conv_act" in site.name for site in quac.injection_of(model).sites)
    assert isinstance(model, UNet2DConditionModel)


def test_weights_that_the_config_asks_for_are_missing(unet, tmp_path):
    unet({"where": "all"}).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "conv_act" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights of 'conv_act\..*was saved by another version"):
        QuACUNet2DModel.from_pretrained(tmp_path)


def test_any_network_of_diffusers_has_its_class():
    assert models.QuACAutoencoderKL is quac_class(diffusers.AutoencoderKL)
    assert models.QuACAutoencoderKL.__name__ == "QuACAutoencoderKL"
    with pytest.raises(AttributeError, match="QuACDDIMScheduler"):
        _ = models.QuACDDIMScheduler
    with pytest.raises(TypeError, match="Linear is no model of diffusers"):
        quac_class(torch.nn.Linear)


def test_a_network_without_an_example_says_how_to_give_one():
    vae = diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8)
    model = add_to_model(copy.deepcopy(vae), {"where": "encoder.*"}, example=torch.rand(1, 3, 32, 32))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad(), quac.use_q(model, Q[:1]):
        assert torch.equal(model.encode(images).latent_dist.mean, vae.encode(images).latent_dist.mean)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10
    )
    with pytest.raises(RuntimeError, match=r"give all its arguments, the images first"):
        add_to_model(transformer)
    assert type(transformer) is diffusers.DiTTransformer2DModel


@pytest.mark.parametrize(
    ("quac_options", "message"),
    [
        ({"wher": "all"}, r"quac\.wher: unknown option 'wher'; did you mean 'where'"),
        ({"norm": "btach"}, r"quac\.norm: unknown norm 'btach'"),
        ({"where": "nowhere.*"}, r"quac: where=.*matches no activation"),
        ("all", "quac: must be a dict of options"),
    ],
)
def test_an_option_that_cannot_be(quac_options, message, plain):
    host = plain()
    for act in (lambda: add_to_model(host, quac_options), lambda: QuACUNet2DModel(quac=quac_options)):
        with pytest.raises(ValueError, match=message):
            act()
    assert type(host) is UNet2DModel
    assert quac.injection_of(host) is None


def test_twice_is_an_error(unet, plain):
    with pytest.raises(ValueError, match="already holds QuAC"):
        add_to_model(unet())
    with pytest.raises(TypeError, match="is made of a UNet2DConditionModel, got UNet2DModel"):
        QuACUNet2DConditionModel.from_host(plain())


def test_over_the_hub(unet, hub):
    model = unet()
    model.push_to_hub("me/restorer")
    again = QuACUNet2DModel.from_pretrained("me/restorer")
    assert torch.equal(out(again), out(model))


def test_a_fused_network_is_saved_as_it_is(unet, tmp_path):
    model = unet({"norm": "batch"})
    expected = out(model)
    quac.fuse(model)
    assert model.config["quac"]["norm"] == "none"
    torch.testing.assert_close(out(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(out(QuACUNet2DModel.from_pretrained(tmp_path).eval()), out(model))
