"""Rows of a UNet call that are equal until the text is read, computed once.

The conditional and the unconditional row of a slot hold the same latent at the same time and part where the first
cross-attention reads the text. Up to there the call takes the S conditional rows alone: hooks repeat what reaches the
first block that reads the text. Within that block, up to its first cross-attention, residual sums run beside the costly
parts, so every row is present and these parts, its first resnet and its first self-attention, are computed for S rows
and their answers repeated. The mathematics is the same. In Stable Diffusion's UNet that resnet and that self-attention
work at the highest resolution; in the embedded one a whole block comes before.

Shapes: S slots, U unconditional rows; repeated rows stand behind the S.
"""

import torch


class SharedRows:
    """Repeats rows at the blocks of one UNet; idle until `call`."""

    def __init__(self, unet: torch.nn.Module):
        self.rows = self.all_rows = 0  # S and S + U of the call under way; 0: rows come as they are
        self.slot_U: torch.Tensor | None = None  # slots repeated; None: all
        first = _first_reader(unet)
        for block in (*unet.down_blocks[first:], unet.mid_block, *unet.up_blocks):
            block.register_forward_pre_hook(self._repeat, with_kwargs=True)
        for part in _before_text(unet.down_blocks[first]):
            part.register_forward_pre_hook(self._take, with_kwargs=True)
            part.register_forward_hook(self._repeat_made)

    def call(self, unet, rows: int, slot_U: torch.Tensor | None, *inputs, **named):
        """unet(*inputs, **named) on S rows, with the rows of slot_U (None: every one) repeated before the text is read."""
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
        """A tensor of S rows with the repeated ones behind it; tuples entry by entry; anything else as it is."""
        if isinstance(value, tuple):
            return tuple(map(self._with_repeated, value))
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != self.rows:
            return value
        return torch.cat([value, value if self.slot_U is None else value[self.slot_U]])

    def _without_repeated(self, value):
        """The first S rows of a tensor of S + U; anything else as it is."""
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != self.all_rows:
            return value
        return value[: self.rows]


def share_rows(unet: torch.nn.Module) -> SharedRows | None:
    """The sharing of a UNet, installed once; None where nothing is known to come before the first cross-attention."""
    if _first_reader(unet) is None:
        return None
    if not hasattr(unet, "shared_rows"):
        unet.shared_rows = SharedRows(unet)
    return unet.shared_rows


def _first_reader(unet: torch.nn.Module) -> int | None:
    """The place of the first down block that reads the text; None where the UNet has no such order."""
    reads = [getattr(block, "has_cross_attention", False) for block in unet.down_blocks]
    return reads.index(True) if True in reads and unet.mid_block is not None else None


def _before_text(block: torch.nn.Module) -> list[torch.nn.Module]:
    """The costly parts of a block that run before its first cross-attention: a resnet, and a self-attention."""
    parts = [block.resnets[0]]
    attention = block.attentions[0].transformer_blocks[0].attn1
    return parts if attention.is_cross_attention else [*parts, attention]
