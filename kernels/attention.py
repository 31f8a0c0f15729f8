"""Attention without a mask; for short sequences on some CPUs, computed as two batched matrix products.

torch's fused CPU kernel works in tiles. On AMD processors, if a head has few tokens, most of its time is tiling
overhead: 64 rows of 64 tokens, 4 heads of width 20, took 2.8 ms fused and 1.6 ms as products; with 16 tokens, 0.77 and
0.28 ms. From about 128 x 128 scores on, the fused kernel is faster (2-core AMD EPYC with AVX2). On an Intel Xeon it is
faster at every shape (benchmarks/LOG.md). torch.compile would pattern-match written-out products back into the fused
kernel, so they are registered as a custom op, which is opaque to it. Legend: B rows, N tokens, T keys, H heads, K
width.
"""

import torch
import torch.nn.functional as F

from kernels import backend
from kernels.checks import check_choice

IMPLEMENTATIONS = ("auto", "torch", "products")
FEW_SCORES = 64 * 64  # N x T up to which the products are faster
HALVES = (torch.float16, torch.bfloat16)


def attention(
    q_BNHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, *, implementation: str = "auto"
) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v for each head; input and output are [B, N, H, K], of any memory layout.

    `auto` selects products for float32 on a non-Intel CPU if N x T <= FEW_SCORES, no gradient is required and autocast
    is off. Otherwise it selects torch's scaled_dot_product_attention, computed in float32 if 16-bit tensors on a CPU
    require a gradient: the 16-bit backward pass took 33 ms, the float32 one with both conversions 5 (80 rows of 64
    tokens, 4 heads of width 20, an Intel Xeon). Products have no gradient.

    Raises ValueError if implementation="products" but a gradient is required or the tensors are not on a CPU.
    Source: Vaswani et al. 2017 (1706.03762) eq. 1.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BNHK, k_BTHK, v_BTHK))
    if implementation == "products" and trained:
        raise ValueError("implementation='products' has no gradient; use torch, or torch.no_grad()")
    device = q_BNHK.device.type
    if implementation == "products" and device != "cpu":
        raise ValueError(f"implementation='products' is for a CPU; q_BNHK is on {device}")
    few = q_BNHK.shape[1] * k_BTHK.shape[1] <= FEW_SCORES and not trained
    pays = device == "cpu" and products_pay(q_BNHK.dtype) and not torch.is_autocast_enabled("cpu")
    if implementation == "products" or (implementation == "auto" and few and pays):
        return torch.ops.trainer.products_attention.default(q_BNHK, k_BTHK, v_BTHK)
    if implementation == "auto" and trained and device == "cpu" and q_BNHK.dtype in HALVES:
        return attention_reference(q_BNHK.float(), k_BTHK.float(), v_BTHK.float()).to(q_BNHK.dtype)
    return attention_reference(q_BNHK, k_BTHK, v_BTHK)


def products_pay(dtype: torch.dtype) -> bool:
    """Whether products are faster than torch's fused kernel on this CPU when there are few scores."""
    return dtype == torch.float32 and not backend.is_intel()


def attention_reference(q_BNHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor) -> torch.Tensor:
    """`attention` by torch's scaled_dot_product_attention."""
    q, k, v = (x.transpose(1, 2) for x in (q_BNHK, k_BTHK, v_BTHK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _products(q_BNHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor) -> torch.Tensor:
    B, N, H, K = q_BNHK.shape
    q, k, v = (x.transpose(1, 2).reshape(B * H, -1, K) for x in (q_BNHK, k_BTHK, v_BTHK))
    ignored = q.new_empty(1, 1, 1).expand(B * H, N, k.shape[1])
    scores = torch.baddbmm(ignored, q, k.transpose(1, 2), beta=0, alpha=K**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(B, H, N, K).transpose(1, 2).contiguous()


_LIBRARY = torch.library.Library("trainer", "FRAGMENT")
_LIBRARY.define("products_attention(Tensor q, Tensor k, Tensor v) -> Tensor")
_LIBRARY.impl("products_attention", _products, "CPU")


@torch.library.register_fake("trainer::products_attention")
def _(q_BNHK, k_BTHK, v_BTHK):
    return q_BNHK.new_empty(q_BNHK.shape)
