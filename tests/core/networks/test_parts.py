"""Typed access to the networks: the same objects come back, and what is of another class is refused by name."""

import copy

import pytest
import torch
from torch import nn

from nerve_core.networks.parts import as_unet, as_vae, drop, of_class, submodule
from small_models import narrow_sd15_unet, small_taesd, small_vae


@pytest.fixture(scope="module")
def unet():
    return narrow_sd15_unet()


def test_a_network_typed_by_its_parts_is_the_same_object(unet):
    vae = small_vae()
    assert as_unet(unet) is unet
    assert as_vae(vae) is vae


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("down_blocks.1.resnets.0", r"resnets\.0 of CrossAttnDownBlock2D is of type Identity; only ResnetBlock2D"),
        ("mid_block.attentions.0", r"attentions\.0 of UNetMidBlock2DCrossAttn .* only Transformer2DModel"),
        ("up_blocks.3.attentions.2", r"attentions\.2 of CrossAttnUpBlock2D .* only Transformer2DModel"),
    ],
)
def test_a_unet_with_an_unknown_layer_is_refused_by_its_place(unet, path, message):
    other = copy.deepcopy(unet)
    layers, _, place = path.rpartition(".")
    other.get_submodule(layers)[int(place)] = nn.Identity()
    with pytest.raises(ValueError, match=message):
        as_unet(other)


def test_a_vae_of_another_class_or_with_an_unknown_layer_is_refused():
    with pytest.raises(ValueError, match="the VAE is of type AutoencoderTiny; only AutoencoderKL"):
        as_vae(small_taesd())
    vae = small_vae()
    vae.encoder.mid_block.attentions[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"attentions\.0 of UNetMidBlock2D is of type Identity; only Attention"):
        as_vae(vae)
    vae.encoder.mid_block.attentions[0] = None  # as where a VAE has no attention
    assert as_vae(vae) is vae


def test_a_module_or_value_of_another_class_is_refused_by_name():
    network = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU()))
    assert submodule(network, "1.0", nn.ReLU) is network[1][0]
    assert of_class(7, int, "patch_size") == 7
    with pytest.raises(ValueError, match=r"1\.0 is of type ReLU; only Linear is supported"):
        submodule(network, "1.0", nn.Linear)
    with pytest.raises(AttributeError):
        submodule(network, "1.1", nn.Linear)
    with pytest.raises(ValueError, match="patch_size is of type list; only int is supported"):
        of_class([7, 7], int, "patch_size")


def test_dropped_modules_are_none_and_their_weights_gone_at_any_depth():
    network = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)))
    for _ in range(2):  # again does no harm
        drop(network, "0", "1.1")
        assert network[0] is None
        assert {name for name, _ in network.named_parameters()} == {"1.0.weight", "1.0.bias"}
    assert torch.equal(network[1][0].bias, dict(network.named_parameters())["1.0.bias"])
