"""UNet attention: keys and values of prompts are computed once, and each shape runs on its fastest backend.

diffusers recomputes the text's keys and values in every layer of every call, although they depend on the prompt alone.
Here they are projected for all layers at once when an image enters its slot, and passed to the UNet as one tensor; each
layer reads its own columns of it. A cache of bounded size keeps them for prompts that occur again.

Which backend is fastest depends on the number of tokens and the head width, so a start-up tuner times the candidates on
the UNet's real shapes. xformers is called in its own layout, without copies.

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
    """softmax(q k^T / sqrt(K)) v, [B, N, H, K] in and out, on a named backend; auto: kernels/attention.py chooses."""
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
    """What the tuner records in one UNet call: the shape of every layer, and one (q, k, v) for each distinct shape.

    Keeping (q, k, v) of every layer would take several times the memory that a call needs at any one moment.
    """

    def __init__(self):
        self.shapes: list[tuple[SlotAttention, tuple[int, ...]]] = []
        self.inputs: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}

    def note(
        self, processor: "SlotAttention", q_BNHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor
    ) -> None:
        """Record a layer's shape, and its inputs if they are the first of that shape."""
        shape = _shape(q_BNHK, k_BTHK)
        self.shapes.append((processor, shape))
        self.inputs.setdefault(shape, (q_BNHK, k_BTHK, v_BTHK))


class SlotAttention:
    """Attention processor of one layer: computes what diffusers' own does, but reads text keys and values if given."""

    def __init__(self, columns: slice | None):
        self.columns = columns  # where `kv` holds this layer's keys and values; None: self-attention
        self.backend = "auto"
        self.seen: Seen | None = None  # collects inputs for the tuner

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        kv: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of hidden_states [B, N, C] to themselves, encoder_hidden_states [B, T, E], or kv [B, T, X]."""
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


def layers_of(unet: torch.nn.Module) -> list[torch.nn.Module]:
    """The attention modules of a UNet in order."""
    from diffusers.models.attention_processor import Attention

    return [module for module in unet.modules() if isinstance(module, Attention)]


def install(unet: torch.nn.Module, fuse: bool = False) -> int:
    """Give every attention layer a SlotAttention, unless it has one; returns X, the width of all text keys and values.

    Args:
        fuse: also compute queries, keys and values of self-attention in one product (more memory, fewer launches).

    Raises:
        ValueError: a layer is not plain Stable Diffusion attention.
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
            layer.to_qkv.requires_grad_(False)  # a new parameter, which does not inherit that its parts are frozen
    return width


def unfuse(unet: torch.nn.Module) -> None:
    """Remove the fused projections, if any, and free their memory; the separate projections still exist."""
    for layer in layers_of(unet):
        if layer.fused_projections:
            layer.fused_projections = False
            del layer.to_qkv


@torch.no_grad()
def text_key_values(unet: torch.nn.Module, context_NTE: torch.Tensor) -> torch.Tensor:
    """Keys and values [N, T, X] of prompt embeddings [N, T, E] in every cross-attention layer of a UNet."""
    return _key_values(_text_layers(unet), context_NTE)


def _text_layers(unet: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for layer in layers_of(unet) if layer.is_cross_attention]


def _key_values(layers: list[torch.nn.Module], context_NTE: torch.Tensor) -> torch.Tensor:
    return torch.cat([x for layer in layers for x in (layer.to_k(context_NTE), layer.to_v(context_NTE))], -1)


class KeyValueCache:
    """Least-recently-used cache of the text keys and values of prompts, bounded in GiB."""

    def __init__(self, unet: torch.nn.Module, capacity_gib: float):
        self.layers, self.capacity = _text_layers(unet), int(capacity_gib * 2**30)
        self.kept: OrderedDict[object, torch.Tensor] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def get(self, key: object, context: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Keys and values [T, X] of a prompt, computed from its embedding `context()` [T, E] if they are not cached.

        With key None they are not cached.
        """
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
    """Time backends on each attention shape of a UNet call and set the best one per shape; returns all timings.

    The best is the fastest, or torch's own choice unless another is clearly faster (see `timings.best`).

    Args:
        call: makes one UNet call on real shapes.
        timer: returns the milliseconds that a function takes.
        asked: auto times the candidates; a name sets that backend everywhere.
        candidates: what auto times, on a GPU; on a CPU the shape alone decides (kernels/attention.py).
        kept: the backend by shape as `chosen` returned it earlier; these shapes time that backend only.

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
    """The backend that `tune` chose for each shape."""
    return ways.chosen(timings, OWN)


def describe(timings: list[Timing]) -> list[str]:
    """One line per shape: every backend with its time or its reason for refusing, fastest first."""
    return [
        f"attention, {rows} rows of {tokens} x {keys}, {heads} heads of {width}: {ways.told(found)}"
        for (rows, tokens, keys, heads, width), found in ways.by_shape(timings).items()
    ]


def _shape(q_BNHK: torch.Tensor, k_BTHK: torch.Tensor) -> tuple[int, int, int, int, int]:
    B, N, H, K = q_BNHK.shape
    return B, N, k_BTHK.shape[1], H, K


@torch.no_grad()
def _time(
    shape: tuple[int, ...],
    backend: str,
    qkv: tuple[torch.Tensor, ...],
    timer: Callable[[Callable[[], object]], float],
) -> Timing:
    """The time of a backend on real inputs, or why it refused. It is probed by a real call: availability flags lie."""
    with warnings.catch_warnings(record=True) as said:  # torch gives its reasons as warnings, once per process
        warnings.simplefilter("always")
        try:
            if not attend(backend, *qkv).isfinite().all():
                return Timing(shape, backend, None, "its output is not finite")
            return Timing(shape, backend, timer(lambda: attend(backend, *qkv)))
        except (RuntimeError, NotImplementedError, ImportError, ValueError) as error:
            return Timing(shape, backend, None, _refusal(error, [str(warning.message) for warning in said]))


def _refusal(error: Exception, said: list[str]) -> str:
    """Why a backend refused, in one line, found among torch's warnings, which also cover the backends switched off."""
    if reasons := xformers_reasons(error):
        return f"no operator takes these tensors: {reasons}"
    told = [warning.partition("(Triggered")[0].strip() for warning in said]
    told = [line for line in told if line and "disabled" not in line and "not used because" not in line]
    return told[0] if told else first_line(error)
