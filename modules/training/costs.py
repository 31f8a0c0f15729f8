"""FLOPs and peak memory of a model call, counted without computing it, by running the same layers on the meta device.

Both depend on shapes alone, so a model of Stable Diffusion's size is counted in a second on any machine, before
anything is allocated. Attention is counted as a fused kernel computes it: its FLOPs, but no score matrix.

Shapes: B rows, T tokens of a prompt, X columns of its keys and values, W guidance embedding width, H W pixels, h w
latent grid.
"""

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from modules.config import Generation, Learning
from modules.diffusion.attention import install
from modules.diffusion.pipeline import StableDiffusion

META = torch.device("meta")

STATE_BYTES = {"sgd": 4, "adamw": 8, "sgd8bit": 1, "adamw8bit": 2}  # optimizer state per parameter


@dataclass(frozen=True)
class Cost:
    """FLOPs and working memory of one call."""

    flop: float  # 2 x multiply-adds of matrix products, convolutions and attention
    peak_bytes: int  # the most it holds at once, not counting its weights and inputs


def cost_of(work: Callable[[], object], held: Iterable[torch.Tensor]) -> Cost:
    """The cost of `work`, which computes on meta tensors; `held` are its weights and inputs, which are not counted."""
    counter, live, attention = FlopCounterMode(display=False), _LiveBytes(held), _FusedAttention()
    with counter, live, attention:
        work()
    return Cost(float(counter.get_total_flops() + attention.flop), live.peak)


@torch.no_grad()
def unet_cost(pipeline: StableDiffusion, rows: int) -> Cost:
    """One UNet call on `rows` latents, with the prompts' keys and values already computed, as in a tick."""
    unet = _on_paper(pipeline.unet, pipeline.dtype)
    size, width = pipeline.latent_size, pipeline.guidance_embedding_width
    empty = partial(torch.empty, dtype=pipeline.dtype, device=META)
    z_B4hw, t_B = empty(rows, 4, size, size), torch.empty(rows, device=META)
    kv_BTX = empty(rows, pipeline.num_tokens, install(unet))
    embedding_BW = empty(rows, width) if width else None

    def work() -> None:
        unet(z_B4hw, t_B, None, timestep_cond=embedding_BW, cross_attention_kwargs={"kv": kv_BTX})

    return cost_of(work, [*unet.parameters(), z_B4hw, t_B, kv_BTX, *([embedding_BW] if width else [])])


@torch.no_grad()
def decode_cost(pipeline: StableDiffusion, rows: int) -> Cost:
    """One call of the VAE decoder on `rows` latents."""
    vae, size = _on_paper(pipeline.vae, pipeline.dtype), pipeline.latent_size
    z_B4hw = torch.empty(rows, 4, size, size, dtype=pipeline.dtype, device=META)
    return cost_of(lambda: vae.decode(z_B4hw), [*vae.parameters(), z_B4hw])


def encoder_cost(encoder: torch.nn.Module, rows: int, size: int, dtype: torch.dtype, *, training: bool) -> Cost:
    """The learner's encoder and head on `rows` views in `dtype`, its autocast type; with backward if `training`."""
    model = copy.deepcopy(encoder).to(META, dtype).train(training)
    x_B3HW = torch.empty(rows, 3, size, size, dtype=dtype, device=META)

    def work() -> None:
        embeddings = model(x_B3HW, "embeddings")
        if training:
            embeddings.sum().backward()

    with torch.set_grad_enabled(training):
        return cost_of(work, [*model.parameters(), *model.buffers(), x_B3HW])


def key_value_columns(pipeline: StableDiffusion) -> int:
    """X, the total width of a prompt's keys and values over all layers of the UNet."""
    return install(_on_paper(pipeline.unet, pipeline.dtype))


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _on_paper(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A module built from the same diffusers config on the meta device, without what was compiled or swapped in."""
    original = getattr(module, "_orig_mod", module)
    with META:
        module = type(original).from_config(original.config)
    return torch.nn.Module.to(module, dtype).eval()  # diffusers' own `to` warns of missing layers


class _FusedAttention(TorchFunctionMode):
    """Replaces scaled_dot_product_attention: counts 2 N M (d + d_v) FLOPs per head and returns an empty tensor."""

    def __init__(self):
        super().__init__()
        self.flop = 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (args + tuple((kwargs or {}).get(name) for name in ("query", "key", "value")))[:3]
        self.flop += 2.0 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class _LiveBytes(TorchDispatchMode):
    """Tracks the bytes of storages that operations create, until these are freed, and their peak."""

    def __init__(self, held: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}
        for tensor in held:
            self._watch(tensor, counted=False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf, counted=True)
        return result

    def _watch(self, tensor: torch.Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name in self._known:
            return
        size = storage.nbytes() if counted else 0

        def dropped(_, name=name, size=size):
            self.live -= size
            del self._known[name]

        self._known[name] = weakref.ref(storage, dropped)
        self.live += size
        self.peak = max(self.peak, self.live)


def prompt_bytes(pipeline: StableDiffusion) -> int:
    """Bytes of one prompt's keys and values in all cross-attention layers."""
    return pipeline.num_tokens * key_value_columns(pipeline) * pipeline.dtype.itemsize


def prompt_cache_bytes(generation: Generation, num_classes: int, pipeline: StableDiffusion) -> int:
    """Bytes of the keys and values of all prompts a run may use, at most generation.kv_cache_gib."""
    prompts = num_classes * len(generation.templates) * len(generation.conditions) + 1
    return min(prompts * prompt_bytes(pipeline), int(generation.kv_cache_gib * 2**30))


def optimizer_bytes(encoder: torch.nn.Module, learning: Learning) -> int:
    """Bytes of the state that the optimizer set in the config section `learning` allocates at its first step."""
    if learning.optimizer == "sgd" and learning.momentum == 0:
        return 0
    return STATE_BYTES[learning.optimizer] * sum(p.numel() for p in encoder.parameters())
