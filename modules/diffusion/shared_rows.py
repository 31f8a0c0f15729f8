"""Computes the rows of a UNet call only once where conditional and unconditional rows are still equal.

The conditional and the unconditional row of a slot hold the same latent at the same timestep, and differ only from the
first cross-attention on, which reads the text. The call therefore starts with the S conditional rows alone, and hooks
repeat rows at the input of the first block that reads the text. In that block, residual sums bypass the costly layers
before the first cross-attention, so all rows must be present there; the costly layers themselves, the first resnet and
the first self-attention, are computed for S rows and their outputs repeated. The result is mathematically the same. In
Stable Diffusion's UNet this resnet and self-attention work at the highest resolution; in the embedded one a whole block
comes before them.

Shapes: S slots, U unconditional rows; the repeated rows follow the S.
"""

import torch


class SharedRows:
    """Hooks that repeat rows in the blocks of one UNet; they do nothing except during `call`."""

    def __init__(self, unet: torch.nn.Module):
        self.rows = self.all_rows = 0  # S and S + U during `call`; 0: the hooks do nothing
        self.slot_U: torch.Tensor | None = None  # slots whose rows are repeated; None: all
        first = _first_reader(unet)
        for block in (*unet.down_blocks[first:], unet.mid_block, *unet.up_blocks):
            block.register_forward_pre_hook(self._repeat, with_kwargs=True)
        for part in _before_text(unet.down_blocks[first]):
            part.register_forward_pre_hook(self._take, with_kwargs=True)
            part.register_forward_hook(self._repeat_made)

    def call(self, unet, rows: int, slot_U: torch.Tensor | None, *inputs, **named):
        """unet(*inputs, **named) on S rows, with the rows of slot_U (None: all) repeated before the text is read."""
        self.rows, self.slot_U = rows, slot_U
        self.all_rows = rows + (rows if slot_U is None else len(slot_U))
        try:
            return unet(*inputs, **named)
        finally:
            self.rows, self.all_rows, self.slot_U = 0, 0, None

    def _repeat(self, block, inputs: tuple, named: dict):
        if not self.rows:
            return None
        return tuple(map(self._with_repeated, inputs)), {key: self._with_repeated(x) for key, x in named.items()}

    def _take(self, part, inputs: tuple, named: dict):
        if not self.rows:
            return None
        return tuple(map(self._without_repeated, inputs)), {key: self._without_repeated(x) for key, x in named.items()}

    def _repeat_made(self, part, inputs: tuple, made: torch.Tensor):
        return self._with_repeated(made) if self.rows else None

    def _with_repeated(self, value):
        """A tensor of S rows with the repeated rows appended; tuples entry by entry; anything else unchanged."""
        if isinstance(value, tuple):
            return tuple(map(self._with_repeated, value))
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != self.rows:
            return value
        return torch.cat([value, value if self.slot_U is None else value[self.slot_U]])

    def _without_repeated(self, value):
        """The first S rows of a tensor of S + U; anything else unchanged."""
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != self.all_rows:
            return value
        return value[: self.rows]


def share_rows(unet: torch.nn.Module) -> SharedRows | None:
    """The SharedRows of a UNet, installed on the first call; None if `_first_reader` finds no block."""
    if _first_reader(unet) is None:
        return None
    if not hasattr(unet, "shared_rows"):
        unet.shared_rows = SharedRows(unet)
    return unet.shared_rows


def _first_reader(unet: torch.nn.Module) -> int | None:
    """The index of the first down block that reads the text; None if there is none, or no mid block."""
    reads = [getattr(block, "has_cross_attention", False) for block in unet.down_blocks]
    return reads.index(True) if True in reads and unet.mid_block is not None else None


def _before_text(block: torch.nn.Module) -> list[torch.nn.Module]:
    """The costly layers of a block before its first cross-attention: its first resnet and any self-attention."""
    parts = [block.resnets[0]]
    attention = block.attentions[0].transformer_blocks[0].attn1
    return parts if attention.is_cross_attention else [*parts, attention]
