"""One tick: every slot takes its own next denoising step in one UNet call of constant shape.

The buffers are static and the arithmetic is the same for every mixture of recipes, so the tick can be captured once as
a CUDA graph. Each slot's row in the step table is kept and advanced on the device; the host counts along and never
reads it.

The shape stays constant even if guidance is switched off at low noise: a call has S conditional rows and U <= S
unconditional ones, which are assigned to the slots that are guided at the moment.

Shapes: S slots, U unconditional rows, N images written, T tokens, X text keys and values of all layers, W guidance
embedding width, h w latent grid, R table rows.
"""

from functools import partial

import torch

from kernels.guided_step import guided_step
from kernels.staging import upload
from modules.diffusion.attention import install, text_key_values
from modules.diffusion.frozen import freeze_layers
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.schedule import StepTable
from modules.diffusion.shared_rows import share_rows

BUFFERS = (
    "z_S4hw",
    "x0_prev_S4hw",
    "row_S",
    "guidance_S",
    "embedding_SW",
    "mask_S1hw",
    "z0_S4hw",
    "eps_S4hw",
    "noise_SK4hw",
)


class Tick:
    """Static buffers of S slots and the step that advances them all."""

    def __init__(
        self,
        pipeline: StableDiffusion,
        table: StepTable,
        slots: int,
        *,
        unconditional_rows: int,
        empty_TE: torch.Tensor | None,
        masked: bool,
    ):
        """Idle slots.

        Args:
            unconditional_rows: U in [0, S]; 0 if nothing is guided or the UNet takes a guidance embedding.
            empty_TE: embedding of the empty prompt, needed if U > 0.
            masked: whether any request edits within a mask.
        """
        self.pipeline, self.table, self.unconditional_rows, self.masked = pipeline, table, unconditional_rows, masked
        self.unet = pipeline.unet  # replaced by its compiled form, see `capture`
        self.shared = share_rows(self.unet)
        freeze_layers(self.unet)
        device, size = pipeline.device, pipeline.latent_size
        self.stochastic_steps = max((g.num_inference_steps for g in table.grids.values() if g.stochastic), default=0)

        def latents(*leading):
            return torch.zeros(*leading, 4, size, size, device=device)

        self.z_S4hw = latents(slots)
        self.x0_prev_S4hw = latents(slots)
        self.row_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self.slot_S = torch.arange(slots, device=device)
        self.guidance_S = torch.ones(slots, device=device)
        self.kv_RTX = torch.zeros(
            slots + unconditional_rows, pipeline.num_tokens, install(self.unet), dtype=pipeline.dtype, device=device
        )
        if unconditional_rows:
            self.kv_RTX[slots:] = text_key_values(self.unet, empty_TE[None])
        width = pipeline.guidance_embedding_width
        self.embedding_SW = torch.zeros(slots, width, dtype=pipeline.dtype, device=device) if width else None
        if masked:
            self.mask_S1hw = torch.ones(slots, 1, size, size, device=device)
            self.z0_S4hw, self.eps_S4hw = latents(slots), latents(slots)
        if self.stochastic_steps:
            self.noise_SK4hw = latents(slots, self.stochastic_steps)

    @torch.no_grad()
    def write(
        self,
        slots: list[int],
        rows: list[int],
        guidance: list[float],
        z0_N4hw: torch.Tensor,
        eps_N4hw: torch.Tensor,
        kv_NTX: torch.Tensor,
        mask_N1hw: torch.Tensor | None = None,
        noise_NK4hw: torch.Tensor | None = None,
    ) -> None:
        """Put N images into the given slots, at their first rows of the step table: z = alpha z0 + sigma eps.

        Args:
            kv_NTX: text keys and values of all layers (see `attention`).
            mask_N1hw: 1 where a latent cell may change; None: everywhere.
            noise_NK4hw: fresh noise for each of the K steps of the grid, for stochastic solvers.
        """
        device = self.row_S.device
        slots_N, rows_N = upload(slots, device), upload(rows, device)
        alpha, sigma = self.table.table_R8[rows_N, :2, None, None, None].unbind(1)
        self.z_S4hw.index_copy_(0, slots_N, alpha * z0_N4hw + sigma * eps_N4hw)
        self.x0_prev_S4hw.index_fill_(0, slots_N, 0.0)
        self.row_S.index_copy_(0, slots_N, rows_N)
        self.guidance_S.index_copy_(0, slots_N, upload(guidance, device, torch.float32))
        self.kv_RTX.index_copy_(0, slots_N, kv_NTX)
        if self.embedding_SW is not None:
            embedded_NW = embed_guidance(guidance, self.embedding_SW.shape[1]).to(self.embedding_SW.dtype)
            self.embedding_SW.index_copy_(0, slots_N, upload(embedded_NW, device))
        if self.masked:
            mask_N1hw = torch.ones_like(z0_N4hw[:, :1]) if mask_N1hw is None else mask_N1hw
            self.mask_S1hw.index_copy_(0, slots_N, mask_N1hw)
            self.z0_S4hw.index_copy_(0, slots_N, z0_N4hw)
            self.eps_S4hw.index_copy_(0, slots_N, eps_N4hw)
        if self.stochastic_steps:
            self.noise_SK4hw.index_copy_(0, slots_N, noise_NK4hw)

    @torch.no_grad()
    def step(self) -> None:
        """Advance every slot by one step; idle slots do not change."""
        S, U, row_S = len(self.row_S), self.unconditional_rows, self.row_S
        x, t = self.z_S4hw, self.table.timestep_R[row_S]
        call, row_of_slot = self.unet, None
        if U:
            slot_U, row_of_slot = self._unconditional_rows()
            if self.shared is not None:
                call = partial(self.shared.call, self.unet, S, slot_U)
            else:
                x, t = (torch.cat([y, y if slot_U is None else y[slot_U]]) for y in (x, t))
        predicted = call(
            x.to(self.pipeline.dtype),
            t,
            None,
            timestep_cond=self.embedding_SW,
            cross_attention_kwargs={"kv": self.kv_RTX},
            return_dict=False,
        )[0]
        noise = {}
        if self.stochastic_steps:
            noise = {"noise_SNchw": self.noise_SK4hw, "noise_step_S": self.table.noise_R[row_S]}
        mask = {}
        if self.masked:
            mask = {"mask_S1hw": self.mask_S1hw, "source_Schw": self.z0_S4hw, "eps_Schw": self.eps_S4hw}
        guided_step(
            predicted[:S],
            predicted[S:] if U else None,
            self.z_S4hw,
            self.x0_prev_S4hw,
            self.table.table_R8,
            row_S,
            self.guidance_S,
            unconditional_row_S=row_of_slot,
            prediction_type=self.pipeline.prediction_type,
            **noise,
            **mask,
        )
        row_S.copy_(self.table.successor_R[row_S])

    def _unconditional_rows(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The slots [U] that get an unconditional row, and the row of each slot or -1 [S].

        None in place of either stands for the identity: row s belongs to slot s.
        """
        S, U = len(self.row_S), self.unconditional_rows
        guided_S = self.table.guided_R[self.row_S]
        if U == S:
            return None, torch.where(guided_S, self.slot_S, -1) if self.table.guidance_ends else None
        guided_S = guided_S & (self.guidance_S != 1)
        slot_U = guided_S.to(torch.int8).argsort(descending=True, stable=True)[:U]
        row_S = torch.full_like(self.slot_S, -1).index_copy(0, slot_U, self.slot_S[:U])
        return slot_U, torch.where(guided_S, row_S, -1)

    def state_dict(self) -> dict:
        """Every buffer that a slot in flight depends on, except keys and values: its prompt gives them again."""
        return {name: getattr(self, name) for name in BUFFERS if getattr(self, name, None) is not None}

    def load_state_dict(self, state: dict) -> None:
        """Restore the buffers of a `state_dict`; the caller writes keys and values."""
        for name, value in state.items():
            getattr(self, name).copy_(value)


def embed_guidance(guidance: list[float], width: int) -> torch.Tensor:
    """Sinusoidal embedding of guidance scales for a guidance-distilled UNet: float32 [N, width] on the host.

    (sin(1000 (w - 1) r_i), cos(1000 (w - 1) r_i)) with r_i = 10000^(-i / (width / 2 - 1)), computed in float32 in the
    order of diffusers' get_guidance_scale_embedding, since the angles are large.
    Source: LCM, 2310.04378 section 4.2.
    """
    half = width // 2
    rate = torch.log(torch.tensor(10000.0)) / (half - 1)
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -rate)
    angles = ((torch.tensor(guidance, dtype=torch.float32) - 1) * 1000.0)[:, None] * rates[None]
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))
