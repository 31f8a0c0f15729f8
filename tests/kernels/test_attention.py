"""Attention by batched products: equal to torch's, taken where there are few scores, opaque to the compiler."""

import pytest
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.attention import FEW_SCORES, attention

SHAPES = [(4, 64, 64, 4, 20), (3, 16, 32, 4, 32), (1, 1, 1, 1, 1), (2, 7, 77, 3, 5)]  # B, N, T, H, K


def operands(B, N, T, H, K, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, N, H, K), (B, T, H, K), (B, T, H, K)
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]


def by_torch(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("scale", (1.0, 30.0))
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_as_near_to_float64_as_torchs_attention(shape, scale):
    qkv = operands(*shape, scale)
    true = by_torch(*(x.double() for x in qkv))
    error, torchs = ((f - true).abs().max() for f in (attention(*qkv, implementation="products"), by_torch(*qkv)))
    assert error <= 2 * torchs + 1e-6 * scale


def test_inputs_of_any_layout():
    q, k, v = operands(2, 8, 8, 4, 6)
    kv = torch.cat([k.flatten(2), v.flatten(2)], -1)  # as the text's keys and values are kept
    k_view, v_view = (x.unflatten(-1, (4, 6)) for x in kv.chunk(2, -1))
    expected = attention(q, k, v, implementation="products")
    assert torch.equal(attention(q, k_view, v_view, implementation="products"), expected)
    q_view = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(attention(q_view, k, v, implementation="products"), expected)


def chosen(monkeypatch, *qkv, **how):
    ran = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: ran.append("torch") or q)
    attention(*qkv, **how)
    return ran or ["products"]


def test_products_run_where_there_are_few_scores_and_nothing_is_trained(monkeypatch):
    monkeypatch.setattr(backend, "is_intel", lambda: False)
    few, many = operands(2, 64, 64, 1, 4), operands(2, FEW_SCORES // 64 + 1, 64, 1, 4)
    assert chosen(monkeypatch, *few) == ["products"]
    assert chosen(monkeypatch, *few, implementation="torch") == ["torch"]
    assert chosen(monkeypatch, *many) == ["torch"]
    assert chosen(monkeypatch, *(x.double() for x in few)) == ["torch"]
    few[1].requires_grad_()
    assert chosen(monkeypatch, *few) == ["torch"]
    with torch.no_grad():
        assert chosen(monkeypatch, *few) == ["products"]
        assert chosen(monkeypatch, *(x.bfloat16() for x in few)) == ["torch"]
        monkeypatch.setattr(backend, "is_intel", lambda: True)
        assert chosen(monkeypatch, *few) == ["torch"]


def test_gradients_are_torchs_and_a_demand_for_products_is_refused():
    q, k, v = (x.requires_grad_() for x in operands(2, 8, 8, 2, 4))
    attention(q, k, v).square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in (q, k, v))
    with pytest.raises(ValueError, match="has no gradient"):
        attention(q, k, v, implementation="products")
    with pytest.raises(ValueError, match="is for a CPU; q_BNHK is on meta"):
        attention(*(x.detach().to("meta") for x in (q, k, v)), implementation="products")
    with pytest.raises(ValueError, match="implementation"):
        attention(q, k, v, implementation="flash")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_gradients_of_16_bits_on_a_cpu_are_made_in_float32(dtype, monkeypatch):
    seen, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: seen.append(qkv[0].dtype) or fused(*qkv))
    leaves = [x.to(dtype).requires_grad_() for x in operands(2, 8, 6, 2, 4)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    out, true = attention(*leaves), by_torch(*doubles)
    assert out.dtype == dtype and seen[0] == torch.float32
    out.float().square().sum().backward()
    true.square().sum().backward()
    for x, exact in zip((out, *(x.grad for x in leaves)), (true, *(x.grad for x in doubles)), strict=True):
        assert (x.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    with torch.no_grad():
        attention(*leaves)
    assert seen[-1] == dtype, "nothing is trained"


def test_the_compiler_sees_one_op_of_the_right_shape():
    from torch.library import opcheck

    q, k, v = operands(2, 8, 6, 2, 4)
    opcheck(torch.ops.trainer.products_attention.default, (q.transpose(0, 1).contiguous().transpose(0, 1), k, v))
