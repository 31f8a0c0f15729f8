"""Group norm with SiLU by its formula, and its swap into diffusers' own modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from kernels.group_norm import GroupNormSiLU, group_norm_silu, swap_group_norm


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6, 7)])
def test_value_is_the_formula(shape, silu):
    x, weight, bias = normal(*shape), normal(6, seed=1), normal(6, seed=2)
    groups = x.reshape(2, 3, -1)
    mean, var = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, unbiased=False)
    affine = (1, 6, *[1] * (len(shape) - 2))
    u = ((groups - mean) / (var + 1e-5).sqrt()).reshape(shape) * weight.view(affine) + bias.view(affine)
    expected = u / (1 + torch.exp(-u)) if silu else u
    torch.testing.assert_close(group_norm_silu(x, 3, weight, bias, silu=silu), expected)


def test_gradient_is_that_of_the_docstring():
    x, weight, bias, dy = normal(2, 6, 4, 5), normal(6, seed=1), normal(6, seed=2), normal(2, 6, 4, 5, seed=3)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    group_norm_silu(x, 3, weight, bias).backward(dy)
    with torch.no_grad():
        grouped = x.reshape(2, 3, -1)
        r = (grouped.var(2, keepdim=True, unbiased=False) + 1e-5).rsqrt()
        x_hat = (grouped - grouped.mean(2, keepdim=True)) * r
        u = x_hat.reshape(x.shape) * weight.view(1, 6, 1, 1) + bias.view(1, 6, 1, 1)
        sigmoid = torch.sigmoid(u)
        g = dy * sigmoid * (1 + u * (1 - sigmoid))
        wg = (g * weight.view(1, 6, 1, 1)).reshape(2, 3, -1)
        dx = r * (wg - wg.mean(2, keepdim=True) - x_hat * (wg * x_hat).mean(2, keepdim=True))
        expected = dx.reshape(x.shape), (g * x_hat.reshape(x.shape)).sum((0, 2, 3)), g.sum((0, 2, 3))
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def plain_norms(module: nn.Module) -> int:
    return sum(type(m) is nn.GroupNorm for m in module.modules())


def test_a_swapped_unet_computes_the_same_and_keeps_its_state_dict(unet):
    swapped = copy.deepcopy(unet)
    assert swap_group_norm(swapped) == plain_norms(unet) > 10
    assert plain_norms(swapped) == 0
    assert list(swapped.state_dict()) == list(unet.state_dict())
    swapped.load_state_dict(unet.state_dict())
    x, t, context = normal(2, 4, 8, 8).float(), torch.tensor([1, 500]), normal(2, 5, 8, seed=1).float()
    contexts = [context.clone().requires_grad_() for _ in range(2)]
    outcomes = [m(x, t, c).sample for m, c in zip((unet, swapped), contexts, strict=True)]
    assert torch.equal(*outcomes)
    for outcome in outcomes:
        outcome.square().sum().backward()
    torch.testing.assert_close(contexts[1].grad, contexts[0].grad, rtol=1e-5, atol=1e-6)


def test_silu_is_taken_into_the_norms_that_it_follows_and_into_no_other(unet):
    swapped = copy.deepcopy(unet)
    swap_group_norm(swapped)
    fused = {name.rsplit(".", 1)[-1] for name, m in swapped.named_modules() if isinstance(m, GroupNormSiLU) and m.silu}
    plain = {name for name, m in swapped.named_modules() if isinstance(m, GroupNormSiLU) and not m.silu}
    assert fused == {"norm1", "norm2", "conv_norm_out"}
    assert plain and all(".attentions." in name for name in plain)


def test_a_swapped_vae_encodes_and_decodes_the_same(vae):
    swapped = copy.deepcopy(vae)
    assert swap_group_norm(swapped) == plain_norms(vae)
    x = normal(1, 3, 16, 16).float().to(memory_format=torch.channels_last)
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
        torch.testing.assert_close(swapped.encode(x).latent_dist.mean, z, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(swapped.decode(z).sample, vae.decode(z).sample, rtol=1e-5, atol=1e-6)


def test_swapping_twice_changes_nothing_more(unet):
    swapped = copy.deepcopy(unet)
    swap_group_norm(swapped)
    assert swap_group_norm(swapped) == 0
    x, t, context = normal(1, 4, 8, 8).float(), torch.tensor([3]), normal(1, 5, 8, seed=1).float()
    with torch.no_grad():
        assert torch.equal(swapped(x, t, context).sample, unet(x, t, context).sample)


def test_a_resnet_with_something_between_norm_and_activation_keeps_its_silu():
    torch.manual_seed(0)
    block = ResnetBlock2D(
        in_channels=8, out_channels=8, temb_channels=8, groups=4, groups_out=4, time_embedding_norm="scale_shift"
    )
    swapped = copy.deepcopy(block)
    swap_group_norm(swapped)
    assert isinstance(swapped.nonlinearity, nn.SiLU) and not swapped.norm2.silu
    x, temb = normal(1, 8, 4, 4).float(), normal(1, 8, seed=1).float()
    assert torch.equal(swapped(x, temb), block(x, temb))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((normal(2, 6), 3, torch.ones(6), torch.ones(6)), r"x_NCHW is \[2, 6\]; expected \[N, C, \.\.\.\]"),
        ((normal(2, 6, 4, 4), 4, torch.ones(6), torch.ones(6)), r"C a multiple of 4 groups"),
        ((normal(0, 6, 4, 4), 3, torch.ones(6), torch.ones(6)), r"not empty"),
        ((normal(2, 6, 4, 4).int(), 3, torch.ones(6), torch.ones(6)), r"x_NCHW is int32\[2, 6, 4, 4\]"),
        ((normal(2, 6, 4, 4), 3, torch.ones(5), torch.ones(6)), r"weight_C is float32\[5\] on cpu; expected .*\[6\]"),
        ((normal(2, 6, 4, 4), 3, torch.ones(6), torch.ones(6, device="meta")), r"bias_C is float32\[6\] on meta"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_norm_silu(*arguments)


def test_the_reference_is_torchs_own():
    x = normal(2, 6, 4, 4).float()
    weight, bias = torch.ones(6), torch.zeros(6)
    assert torch.equal(group_norm_silu(x, 3, weight, bias), F.silu(F.group_norm(x, 3, weight, bias)))
