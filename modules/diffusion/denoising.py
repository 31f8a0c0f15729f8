"""The denoising loss of a diffusion model: noised inputs, the targets that the UNet should predict, and its errors.

Shared by inversion, which minimizes this loss, and the token report, which measures it.

Shapes: B rows, T timesteps of the schedule, E text width, h w the latent grid.
"""

from collections.abc import Sequence

import torch

from kernels.staging import upload
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.schedule import alphas_cumprod
from modules.diffusion.tick import embed_guidance

DISTILLED_GUIDANCE = 8.5  # for a UNet that takes its guidance scale as an input (LCM): diffusers' default for those


class Denoising:
    """Inputs, targets and losses of one pipeline's UNet at random timesteps."""

    def __init__(self, pipeline: StableDiffusion):
        self.pipeline, self.velocity = pipeline, pipeline.prediction_type == "v_prediction"
        self.abar_T = alphas_cumprod(pipeline.scheduler).to(pipeline.device, torch.float32)

    def noised(self, z_0: torch.Tensor, eps: torch.Tensor, u_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(z_t in the pipeline's dtype, target float32, t int64 [B]) at t = floor(u T).

        z_t = sqrt(abar) z_0 + sqrt(1-abar) eps; the target is eps, or sqrt(abar) eps - sqrt(1-abar) z_0 if the
        scheduler says v_prediction. z_0 and eps are float32 [B, 4, h, w], u in [0, 1).
        Source: 2006.11239 eq. 4; 2202.00512 appendix D.
        """
        t_B = (u_B * len(self.abar_T)).long().clamp_(max=len(self.abar_T) - 1)
        abar = self.abar_T[t_B][:, None, None, None]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        z_t = (alpha * z_0 + sigma * eps).to(self.pipeline.dtype, memory_format=torch.channels_last)
        return z_t, alpha * eps - sigma * z_0 if self.velocity else eps, t_B

    def losses(
        self, z_t: torch.Tensor, target: torch.Tensor, t_B: torch.Tensor, context_BTE: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error of each row's prediction, float32 [B]."""
        width, condition = self.pipeline.guidance_embedding_width, None
        if width:
            condition = (
                upload(embed_guidance([DISTILLED_GUIDANCE], width), z_t.device).to(z_t.dtype).expand(len(z_t), -1)
            )
        predicted = self.pipeline.unet(z_t, t_B, context_BTE, timestep_cond=condition).sample
        return (predicted.float() - target).square().mean((1, 2, 3))


def stratified(labels_B: Sequence[int], draw: torch.Generator) -> torch.Tensor:
    """u in [0, 1) float32 [B], each uniform; the u of a class's n rows are 1/n apart: u_i = (u_0 + i/n) mod 1.

    Source: Variational Diffusion Models, 2107.00630, appendix I.1.
    """
    starts = torch.rand(max(labels_B) + 1, generator=draw)
    offsets = [labels_B[:row].count(label) / labels_B.count(label) for row, label in enumerate(labels_B)]
    return (starts[torch.tensor(labels_B)] + torch.tensor(offsets)) % 1.0
