"""Attention of the UNet: keys and values of prompts computed once, and the fastest backend for each of its shapes.

diffusers computes the text's keys and values anew in every layer of every call, although they depend on the prompt
alone. Here they are projected when an image enters its slot, for all layers at once, and handed to the UNet as one
tensor of which each layer reads its own columns. Prompts that come back are found in a cache bounded in bytes.

Which backend is fastest depends on tokens and head width, so a start-up tuner times the candidates on the UNet's real
shapes with a timer it is handed. xformers is called in its own layout, without copies.

Shapes: B rows, N tokens of an image, T tokens of a prompt, H heads, K width of a head, E text width, X columns of the
keys and values of all layers.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from kernels.attention import attention, attention_reference
from kernels.staging import in_use
from modules.diffusion import timings as ways
from modules.diffusion.timings import Timing, name_of
from modules.errors import ConfigError, first_line
from modules.probes import ATTENTION, xformers_reasons

SDPA = {f"sdpa_{name}": backend for name, backend in ATTENTION.items()}
BACKENDS = ("sdpa", *SDPA, "xformers")
OWN = "sdpa"  # torch's own choice
PLAIN = ("spatial_norm", "group_norm", "norm_q", "norm_k")  # absent in every Stable Diffusion UNet


def attend(backend: str, q_BNHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v, [B, N, H, K] in and out, by a named backend; auto: as kernels/attention.py chooses."""
    if backend == "auto":
        return attention(q_BNHK, k_BTHK, v_BTHK)
    if backend == "sdpa":
        return attention_reference(q_BNHK, k_BTHK, v_BTHK)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q_BNHK, k_BTHK, v_BTHK)
    q, k, v = (x.transpose(1, 2) for x in (q_BNHK, k_BTHK, v_BTHK))
    with sdpa_kernel(SDPA[backend]):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Seen:
    """What a tuner meets in one call of a UNet: each layer's shape, and one (q, k, v) of every shape.

    Of one, not of every layer: all of them together are several times what a call holds at once.
    """

    def __init__(self):
        self.shapes: list[tuple[SlotAttention, tuple[int, ...]]] = []
        self.inputs: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}

    def note(self, processor: "SlotAttention", q_BNHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor):
        """Remember a layer's shape, and its inputs where none of that shape are known."""
        shape = _shape(q_BNHK, k_BTHK)
        self.shapes.append((processor, shape))
        self.inputs.setdefault(shape, (q_BNHK, k_BTHK, v_BTHK))


class SlotAttention:
    """Attention processor of one layer; equal to diffusers' own, with keys and values of the text read where given."""

    def __init__(self, columns: slice | None):
        self.columns = columns  # of the layer's keys and values in `kv`; None: self-attention
        self.backend = "auto"
        self.seen: Seen | None = None  # collects inputs for the tuner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, kv=None):
        """hidden_states [B, N, C] attended to themselves, or to the text: encoder_hidden_states [B, T, E] or kv [B, T, X]."""
        if self.columns is None and attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, -1)
        else:
            q = attn.to_q(hidden_states)
            if self.columns is not None and kv is not None:
                k, v = kv[..., self.columns].chunk(2, -1)
            else:
                source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
                k, v = attn.to_k(source), attn.to_v(source)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        if self.seen is not None:
            self.seen.note(self, q, k, v)
        return attn.to_out[0](attend(self.backend, q, k, v).flatten(2))


def layers_of(unet: torch.nn.Module) -> list:
    """The attention modules of a UNet in order."""
    from diffusers.models.attention_processor import Attention

    return [module for module in unet.modules() if isinstance(module, Attention)]


def install(unet: torch.nn.Module, fuse: bool = False) -> int:
    """Give every attention layer a SlotAttention, once; returns X, the width of all layers' text keys and values.

    Args:
        fuse: also compute queries, keys and values of self-attention in one product (more memory, fewer launches).

    Raises:
        ValueError: a layer that is not plain Stable Diffusion attention.
    """
    width = 0
    for layer in layers_of(unet):
        odd = [name for name in PLAIN if getattr(layer, name, None) is not None]
        if odd or layer.residual_connection or layer.rescale_output_factor != 1:
            raise ValueError(
                f"attention layer with {', '.join(odd) or 'residual or rescaling'}; expected plain attention"
            )
        inner = layer.to_q.out_features
        columns = slice(width, width + 2 * inner) if layer.is_cross_attention else None
        width += 2 * inner if layer.is_cross_attention else 0
        if not isinstance(layer.processor, SlotAttention):
            layer.set_processor(SlotAttention(columns))
        if fuse and not layer.is_cross_attention and not layer.fused_projections:
            layer.fuse_projections()
            layer.to_qkv.requires_grad_(False)  # a parameter of its own: it forgets that its parts are frozen
    return width


def unfuse(unet: torch.nn.Module) -> None:
    """Give back the memory of fused projections, where there are any; their parts are still there."""
    for layer in layers_of(unet):
        if layer.fused_projections:
            layer.fused_projections = False
            del layer.to_qkv


@torch.no_grad()
def text_key_values(unet: torch.nn.Module, context_NTE: torch.Tensor) -> torch.Tensor:
    """Keys and values [N, T, X] of prompt embeddings [N, T, E] in every cross-attention layer of a UNet with `install`."""
    return _key_values(_text_layers(unet), context_NTE)


def _text_layers(unet: torch.nn.Module) -> list:
    return [layer for layer in layers_of(unet) if layer.is_cross_attention]


def _key_values(layers: list, context_NTE: torch.Tensor) -> torch.Tensor:
    return torch.cat([x for layer in layers for x in (layer.to_k(context_NTE), layer.to_v(context_NTE))], -1)


class KeyValueCache:
    """Text keys and values of prompts, the last used longest, within a bound in GiB."""

    def __init__(self, unet: torch.nn.Module, capacity_gib: float):
        self.layers, self.capacity = _text_layers(unet), int(capacity_gib * 2**30)
        self.kept: OrderedDict[object, torch.Tensor] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def get(self, key: object, context: Callable[[], torch.Tensor]) -> torch.Tensor:
        """[T, X] of a prompt; `context` gives its embedding [T, E] if it is not kept. Key None: never kept."""
        if key in self.kept:
            self.hits += 1
            self.kept.move_to_end(key)
            return in_use(self.kept[key])
        self.misses += 1
        with torch.no_grad():
            kv_TX = _key_values(self.layers, context()[None])[0]
        size = kv_TX.nbytes
        if key is not None and size <= self.capacity:
            self.kept[key] = kv_TX
            self.bytes += size
            while self.bytes > self.capacity:
                self.bytes -= self.kept.popitem(last=False)[1].nbytes
        return kv_TX


def tune(
    unet: torch.nn.Module,
    call: Callable[[], None],
    timer: Callable[[Callable[[], object]], float],
    asked: str = "auto",
    candidates: tuple[str, ...] = BACKENDS,
    kept: dict[str, str] | None = None,
) -> list[Timing]:
    """Time backends on each attention shape that `call` meets in the UNet, and set the best; returns all timings.

    The best is the fastest, but torch's own choice where no other is clearly faster (see `timings.best`).

    Args:
        call: one UNet call on real shapes.
        timer: milliseconds of a function.
        asked: auto times the candidates; a name sets that backend everywhere.
        candidates: what auto chooses from by time, on a GPU; on a CPU the shape alone decides (kernels/attention.py).
        kept: backend by shape as `chosen` returned it before; it is taken again.

    Raises:
        ConfigError: the named backend refuses a shape of this UNet (with its reason).
    """
    processors = [layer.processor for layer in layers_of(unet)]
    seen = Seen()
    for processor in processors:
        processor.backend, processor.seen = "sdpa", seen
    try:
        call()
    finally:
        for processor in processors:
            processor.seen = None
    candidates = candidates if asked == "auto" else (asked,)
    names = {shape: [kept[name_of(shape)]] if kept and name_of(shape) in kept else candidates for shape in seen.inputs}
    timings = [_time(shape, name, qkv, timer) for shape, qkv in seen.inputs.items() for name in names[shape]]
    taken = chosen(timings)
    for processor, shape in seen.shapes:
        if name_of(shape) not in taken:
            refused = next(t for t in timings if t.shape == shape)
            raise ConfigError(
                f"pipeline.attention is {asked}, which does not run here on (rows, tokens, keys, heads, width) "
                f"{refused.shape}: {refused.reason}; set it to auto or sdpa"
            )
        processor.backend = taken[name_of(shape)]
    return timings


def chosen(timings: list[Timing]) -> dict[str, str]:
    """The backend that `tune` took at each shape."""
    return ways.chosen(timings, OWN)


def describe(timings: list[Timing]) -> list[str]:
    """A line for each shape: every backend with its time, or why it refused, the fastest first."""
    return [
        f"attention, {rows} rows of {tokens} x {keys}, {heads} heads of {width}: {ways.told(found)}"
        for (rows, tokens, keys, heads, width), found in ways.by_shape(timings).items()
    ]


def _shape(q_BNHK: torch.Tensor, k_BTHK: torch.Tensor) -> tuple[int, int, int, int, int]:
    B, N, H, K = q_BNHK.shape
    return B, N, k_BTHK.shape[1], H, K


@torch.no_grad()
def _time(shape, backend: str, qkv, timer) -> Timing:
    """The time of a backend on real inputs, or why it refused: probed by a real call, as availability flags lie."""
    with warnings.catch_warnings(record=True) as said:  # torch tells its reasons as warnings, once a process
        warnings.simplefilter("always")
        try:
            if not attend(backend, *qkv).isfinite().all():
                return Timing(shape, backend, None, "its output is not finite")
            return Timing(shape, backend, timer(lambda: attend(backend, *qkv)))
        except (RuntimeError, NotImplementedError, ImportError, ValueError) as error:
            return Timing(shape, backend, None, _refusal(error, [str(warning.message) for warning in said]))


def _refusal(error: Exception, said: list[str]) -> str:
    """Why a backend refused, in one line; torch warns of its reasons, among those of the backends that were switched off."""
    if reasons := xformers_reasons(error):
        return f"no operator takes these tensors: {reasons}"
    told = [warning.partition("(Triggered")[0].strip() for warning in said]
    told = [line for line in told if line and "disabled" not in line and "not used because" not in line]
    return told[0] if told else first_line(error)
