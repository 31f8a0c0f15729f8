"""The parts of a Stable Diffusion pipeline and the conversions between pixels, latents and prompt embeddings.

diffusers' pipelines run one list of prompts at one strength, from PIL images to PIL images. The slot engine needs the
parts: moments that are encoded once and sampled many times, prompts that are embedded once, and a UNet that can be
called on any mixture of images. One class holds the parts and the four conversions; denoising itself is in `slots`.

Shapes: D and N images, T tokens of a prompt (77), K vectors of a class token, E embedding width, H W pixels, h w latent
grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.staging import upload
from modules.config import Pipeline
from modules.errors import ConfigError, DataError
from modules.runtime import dtype_name

NO_VARIANCE = -1e4  # log-variance for an encoder without variance: its standard deviation exp(-5000) is exactly 0
SLOT = "*"  # stands for the class token in a prompt
SHORTEN = (
    "shorten its template or its condition (a word of generation.conditions or a keyword of the class), or lower "
    "inversion.num_vectors"
)


@dataclass
class StableDiffusion:
    """The parts of a latent text-to-image model on one device, frozen, in evaluation mode."""

    tokenizer: object  # CLIPTokenizer
    text_encoder: torch.nn.Module  # CLIPTextModel
    vae: torch.nn.Module  # AutoencoderKL or AutoencoderTiny
    unet: torch.nn.Module  # UNet2DConditionModel
    scheduler: dict  # diffusers' scheduler_config.json, `prediction_type` always present
    device: torch.device
    dtype: torch.dtype
    resolution: int  # pixels a side
    digest: str  # sha256 of weights, schedule, vocabulary and padding
    source: str  # where the weights came from
    family: str = "sd1"  # sd1 | sd2 | turbo | lcm

    @property
    def vae_factor(self) -> int:
        """Side of a latent cell in pixels."""
        widths = getattr(self.vae.config, "block_out_channels", None) or self.vae.config.decoder_block_out_channels
        return 2 ** (len(widths) - 1)

    @property
    def latent_size(self) -> int:
        return self.resolution // self.vae_factor

    @property
    def scaling_factor(self) -> float:
        return self.vae.config.scaling_factor

    @property
    def shift_factor(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    @property
    def prediction_type(self) -> str:
        """epsilon or v_prediction."""
        return self.scheduler["prediction_type"]

    @property
    def guidance_embedding_width(self) -> int:
        """Width of the guidance embedding that the UNet takes instead of a second call (LCM); 0 if it takes none."""
        return self.unet.config.time_cond_proj_dim or 0

    @property
    def num_tokens(self) -> int:
        """T, the fixed length of every prompt."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    @property
    def text_width(self) -> int:
        """E of a prompt embedding."""
        return self.text_encoder.config.hidden_size

    @torch.no_grad()
    def encode_moments(
        self, pixels_DHWC: torch.Tensor, batch: int = 16, progress: Callable[[int, int, str], None] | None = None
    ) -> torch.Tensor:
        """VAE moments [D, 8, h, w] fp16 (mean, log-variance in [-30, 20]) of uint8 images [D, H, W, 3] at `resolution`.

        For an encoder without variance (AutoencoderTiny) the log-variance is -1e4, a standard deviation of exactly 0.
        """
        moments = []
        for rows_NHWC in pixels_DHWC.split(batch):
            x_N3HW = to_vae_range(rows_NHWC.to(self.device)).to(self.dtype)
            encoded = self.vae.encode(x_N3HW)
            if hasattr(encoded, "latents"):
                mean, logvar = encoded.latents, torch.full_like(encoded.latents, NO_VARIANCE)
            else:
                mean, logvar = encoded.latent_dist.mean, encoded.latent_dist.logvar
            moments.append(torch.cat([mean, logvar], 1).half())
            if progress is not None:
                progress(sum(map(len, moments)), len(pixels_DHWC), "VAE moments")
        return torch.cat(moments)

    def sample_latents(self, moments_N8hw: torch.Tensor, noise_N4hw: torch.Tensor) -> torch.Tensor:
        """z_0 = (mean + sd * noise - shift) * scaling, float32 [N, 4, h, w], from moments and standard normal noise."""
        mean, logvar = moments_N8hw.float().chunk(2, 1)
        return (mean + (0.5 * logvar).exp() * noise_N4hw - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, z_N4hw: torch.Tensor) -> torch.Tensor:
        """Scaled latents to pixels [N, 3, H, W] in the pipeline's dtype, nominally in [-1, 1] and not clamped."""
        return self.vae.decode((z_N4hw / self.scaling_factor + self.shift_factor).to(self.dtype)).sample

    def check_vae(self, pixels_DHWC: torch.Tensor) -> None:
        """Check that the VAE encodes and decodes these uint8 images to finite values.

        Raises:
            DataError: it does not; some VAEs overflow in fp16.
        """
        moments = self.encode_moments(pixels_DHWC)
        decoded = self.decode(self.sample_latents(moments, torch.zeros_like(moments[:, :4]).float()))
        if not (moments.isfinite().all() and decoded.isfinite().all()):
            raise DataError(self._overflow())

    def check_moments(self, moments_D8hw: torch.Tensor, files: Sequence[str]) -> None:
        """Check that VAE moments are finite; waits for the device once.

        Args:
            files: the file of each image.

        Raises:
            DataError: they are not; it names the first file, because a VAE may overflow on some images only.
        """
        low_D, high_D = moments_D8hw.flatten(1).aminmax(
            dim=1
        )  # propagates NaN; isfinite would allocate a full-size mask
        bad = (~(low_D.isfinite() & high_D.isfinite())).nonzero().flatten().tolist()
        if bad:
            more = f" and {len(bad) - 1} more of {len(files)} images" if len(bad) > 1 else ""
            raise DataError(self._overflow(f" for {files[bad[0]]}{more}"))

    def _overflow(self, where: str = "") -> str:
        wider = {torch.float16: "pipeline.dtype to bf16 or fp32, or ", torch.bfloat16: "pipeline.dtype to fp32, or "}
        return (
            f"{self.source}: the VAE gives non-finite values{where} in {dtype_name(self.dtype)}; set "
            f"{wider.get(self.dtype, '')}pipeline.vae to another VAE"
        )

    def prompt_ids(self, prompts: list[str]) -> torch.Tensor:
        """Token ids [N, T] int64 on the device: start, text, end, padding.

        Raises:
            ConfigError: a prompt is too long for the text encoder; truncating it would change it silently.
        """
        return upload([self._pad(self._ids(text), text) for text in prompts], self.device)

    def check_lengths(self, prompts: Sequence[str], num_vectors: int = 0, remedy: str = SHORTEN) -> None:
        """Check that no prompt is too long for the text encoder; with K = `num_vectors` > 0, `*` counts as K tokens.

        Raises:
            ConfigError: `embed`, or `embed_vectors` with K > 0, would refuse a prompt. The message names the longest
                prompt and ends with `remedy`.
        """
        parts = {text: _around_slot(text) if num_vectors else [text] for text in prompts}
        distinct = list(dict.fromkeys(part for found in parts.values() for part in found))
        if not distinct:
            return
        ids = self.tokenizer(distinct, add_special_tokens=False)["input_ids"]
        counts = dict(zip(distinct, map(len, ids), strict=True))
        taken = {text: num_vectors + sum(counts[part] for part in found) for text, found in parts.items()}
        longest = max(taken, key=taken.__getitem__)
        self._refuse_longer(longest, taken[longest], remedy)

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Prompt embeddings [N, T, E] in the pipeline's dtype, as diffusers makes them (last hidden state, no mask)."""
        return self.embed_ids(self.prompt_ids(prompts))

    def embed_ids(self, ids_NT: torch.Tensor) -> torch.Tensor:
        """Prompt embeddings [N, T, E] of token ids [N, T]."""
        return self.text_encoder(ids_NT).last_hidden_state

    def embed_vectors(self, prompts: list[str], vectors_NKE: torch.Tensor) -> torch.Tensor:
        """Prompt embeddings [N, T, E] of prompts in which `*` stands for the prompt's own K token vectors.

        The vectors take the place of rows of the token embedding, before positions are added, so the result is the same
        as with K new vocabulary entries that have these rows. Gradients flow to the vectors. No state is changed.

        Args:
            prompts: N texts with exactly one `*` each.
            vectors_NKE: vectors in the text encoder's embedding space, any float dtype.

        Raises:
            ConfigError: a prompt does not have exactly one `*`, or is too long with its vectors.
        """
        num_vectors = vectors_NKE.shape[1]
        rows, starts = [], []
        for text in prompts:
            before, after = (self._ids(part) for part in _around_slot(text))
            starts.append(1 + len(before))
            rows.append(self._pad(before + [self.tokenizer.eos_token_id] * num_vectors + after, text))
        ids_NT = upload(rows, self.device)
        columns = upload(starts, self.device)[:, None] + torch.arange(num_vectors, device=self.device)
        here = (torch.arange(len(rows), device=self.device)[:, None], columns)

        def splice(module, inputs, embedded_NTE):
            return embedded_NTE.index_put(here, vectors_NKE.to(embedded_NTE))

        handle = self.text_encoder.get_input_embeddings().register_forward_hook(splice)
        try:
            return self.embed_ids(ids_NT)
        finally:
            handle.remove()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _pad(self, ids: list[int], text: str) -> list[int]:
        self._refuse_longer(text, len(ids), SHORTEN)
        padding = [self.tokenizer.pad_token_id] * (self.num_tokens - 2 - len(ids))
        return [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id, *padding]

    def _refuse_longer(self, text: str, taken: int, remedy: str) -> None:
        if taken > self.num_tokens - 2:
            raise ConfigError(
                f"prompt {text!r} takes {taken} tokens, the text encoder reads {self.num_tokens - 2}; {remedy}"
            )


def to_vae_range(pixels_NHWC: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1], channels last: the range the VAE reads and decodes to."""
    return pixels_NHWC.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _around_slot(text: str) -> list[str]:
    """The text before and after the class token."""
    if text.count(SLOT) != 1:
        raise ConfigError(
            f"prompt {text!r} must hold exactly one {SLOT}, which stands for the class token; use no {SLOT} in templates, "
            "condition words and keywords"
        )
    return text.split(SLOT)


def own_resolution(cfg: Pipeline) -> int:
    """The resolution, in pixels a side, of the pipeline that config section `pipeline` names, without reading weights.

    Raises: as `load_pipeline`, for faults that show without the weights.
    """
    from modules.diffusion import checkpoints

    return checkpoints.own_resolution(cfg)


def load_pipeline(
    cfg: Pipeline, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusion:
    """The pipeline that config section `pipeline` names, on a device, frozen.

    Raises:
        DataError: the folder or a part of it is missing, broken, pickled, or does not fit the other parts.
        ConfigError: family, prediction type or resolution contradict the files.
    """
    from modules.diffusion import checkpoints  # imports diffusers, which takes seconds that --help must not cost

    return checkpoints.load(cfg, torch.device(device), dtype)
