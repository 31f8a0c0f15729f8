"""Trains a small Stable Diffusion pipeline from scratch: tokenizer, VAE, then text encoder and UNet together.

The result is a diffusers folder that loads through the same code as Stable Diffusion 1.5. Two things make a small
pipeline useful for textual inversion:

- captions are reworded with every inversion template, so that no template holds an untrained word;
- with probability `instance_tokens` the noun of a caption is replaced by a token of this particular object (the `model`
  of the pack). The rows of these tokens are trained with everything else and dropped at the end. What remains is a text
  encoder and a UNet that can be told "this thing" by a single learned vector, which is what a class token is.

Shapes: B rows, T tokens, N images, h w the latent grid.
"""

import copy
import json
import math
from functools import lru_cache

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from modules.config import PipelineShape, PipelineTraining
from modules.diffusion.pipeline import StableDiffusion, to_vae_range
from modules.diffusion.prompts import OBJECT_TEMPLATES, fill, phrase_of
from modules.rules import NORM_GROUPS
from modules.runtime import seeded, stream

MOMENTS_BATCH = 64  # images encoded at once
CAPTIONS_KEPT = 2**16  # size of the cache of tokenized texts


def build_tokenizer(captions: list[str], shape: PipelineShape) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from the captions and every inversion template."""
    corpus = captions + [fill(t, "object") for t in OBJECT_TEMPLATES] * max(2, len(captions) // 500)
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary - 258,
        min_frequency=2,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in _merges(bpe)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(m) for m in merges)]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    vocabulary["<|startoftext|>"] = len(vocabulary)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=shape.max_tokens)


def _merges(bpe: Tokenizer) -> list:
    return json.loads(bpe.to_str())["model"]["merges"]


def build_vae(shape: PipelineShape, seed: int) -> AutoencoderKL:
    """An untrained AutoencoderKL with 4 latent channels and a grid 2^(levels - 1) times smaller a side."""
    with seeded(seed, "vae"):
        levels = len(shape.vae_channels)
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=shape.vae_channels,
            layers_per_block=1,
            norm_num_groups=NORM_GROUPS["vae_channels"],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            sample_size=shape.resolution,
        )


def build_text_and_unet(
    shape: PipelineShape, tokenizer: CLIPTokenizer, seed: int
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """An untrained text encoder and a UNet with cross-attention below the highest resolution."""
    bos, eos = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    with seeded(seed, "text and unet"):
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=shape.text_width,
                projection_dim=shape.text_width,
                intermediate_size=4 * shape.text_width,
                num_hidden_layers=shape.text_layers,
                num_attention_heads=shape.text_heads,
                max_position_embeddings=shape.max_tokens,
                bos_token_id=bos,
                eos_token_id=eos,
                pad_token_id=eos,
            )
        )
        inner = len(shape.unet_channels) - 1
        unet = UNet2DConditionModel(
            sample_size=shape.resolution // 2 ** (len(shape.vae_channels) - 1),
            block_out_channels=shape.unet_channels,
            layers_per_block=1,
            norm_num_groups=NORM_GROUPS["unet_channels"],
            attention_head_dim=4,
            cross_attention_dim=shape.text_width,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * inner,
            up_block_types=("CrossAttnUpBlock2D",) * inner + ("UpBlock2D",),
        )
    return text, unet


def copy_text_and_unet(pipeline: StableDiffusion) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """The text encoder and UNet of a loaded pipeline as fp32 copies that can be trained on."""
    text = CLIPTextModel(pipeline.text_encoder.config)
    unet = UNet2DConditionModel.from_config(pipeline.unet.config)
    text.load_state_dict(pipeline.text_encoder.state_dict())
    unet.load_state_dict(pipeline.unet.state_dict())
    return text.float(), unet.float()


def copy_vae(pipeline: StableDiffusion) -> AutoencoderKL:
    """The VAE of a loaded pipeline as an fp32 copy that can be trained on."""
    vae = AutoencoderKL.from_config(pipeline.vae.config)
    vae.load_state_dict(pipeline.vae.state_dict())
    return vae.float()


class Stage:
    """What both stages share: AdamW with warm-up and cosine decay, a moving average of the weights, a saveable state.

    Everything is on `device`, where the modules are; random numbers are drawn on the CPU and moved there.
    """

    def __init__(self, modules: dict, extra: list, steps: int, lr: float, recipe: PipelineTraining, seed: int):
        self.modules, self.steps, self.lr, self.recipe, self.seed = modules, steps, lr, recipe, seed
        self.device = next(next(iter(modules.values())).parameters()).device
        self.averages = {name: copy.deepcopy(module).requires_grad_(False) for name, module in modules.items()}
        self.parameters = [p for module in modules.values() for p in module.parameters()] + extra
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
        self.extra, self.step = extra, 0

    def learning_rate(self) -> float:
        """Linear warm-up times a cosine to zero; a pure function of the step."""
        warm = min(1.0, (self.step + 1) / self.recipe.warmup_steps)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))

    def update(self, loss: torch.Tensor) -> None:
        """One AdamW step with the gradient norm clipped to 1, then an update of the moving average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, module in self.modules.items():
                for average, value in zip(self.averages[name].parameters(), module.parameters(), strict=True):
                    average.lerp_(value, 1 - decay)

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "averages": {name: module.state_dict() for name, module in self.averages.items()},
            "extra": [p.data for p in self.extra],
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
            self.averages[name].load_state_dict(state["averages"][name])
        for parameter, value in zip(self.extra, state["extra"], strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def vae_stage(
    vae: AutoencoderKL, steps: int, recipe: PipelineTraining, seed: int, device: torch.device | str = "cpu"
) -> Stage:
    """The first stage, on `device`: AutoencoderKL alone."""
    return Stage({"vae": vae.to(device, memory_format=torch.channels_last)}, [], steps, recipe.vae_lr, recipe, seed)


def vae_step(stage: Stage, pixels_NHWC: torch.Tensor) -> float:
    """One step on the mean squared error of a decoded latent sample plus a small KL term; returns the squared error."""
    recipe, vae = stage.recipe, stage.modules["vae"]
    draw = stream(stage.seed, "vae step", stage.step)
    rows = torch.randint(len(pixels_NHWC), (recipe.vae_batch,), generator=draw)
    x = to_vae_range(flip_rows(pixels_NHWC[rows], draw))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.bf16):
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draw).to(x)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
    error = (y.float() - x).square().mean()
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    stage.update(error + recipe.kl_weight * kl)
    return error.item()


def flip_rows(pixels_NHWC: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Each row mirrored with probability one half."""
    flip = torch.rand(len(pixels_NHWC), generator=draw) < 0.5
    return torch.where(flip[:, None, None, None].to(pixels_NHWC.device), pixels_NHWC.flip(2), pixels_NHWC)


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, pixels_NHWC: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Moments of every image and of its mirror image, [2N, 8, h, w] fp16, and the scaling factor 1 / sd(latents)."""
    moments = []
    for flipped in (False, True):
        for rows in pixels_NHWC.split(MOMENTS_BATCH):
            x = to_vae_range(rows.flip(2) if flipped else rows)
            posterior = vae.encode(x).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.logvar], 1).half())
    moments = torch.cat(moments)
    return moments, 1 / moments[:, :4].float().std().item()


class Captions:
    """Draws a wording for a caption: a template with its noun, with "object" or with the object's token, or no text."""

    def __init__(
        self,
        captions: list[str],
        nouns: list[str],
        objects: list[str],
        tokenizer: CLIPTokenizer,
        recipe: PipelineTraining,
    ):
        self.recipe, self.tokenizer = recipe, tokenizer
        self.phrases = [phrase_of(caption) for caption in captions]
        self.nouns = nouns
        names = {name: i for i, name in enumerate(sorted(set(objects)))}
        self.objects = [names[name] for name in objects]
        self.num_objects = len(names)
        self.mark = tokenizer.convert_tokens_to_ids("*</w>")  # marks the place of the object's own vector
        self._encode = lru_cache(maxsize=CAPTIONS_KEPT)(self._tokenized)

    def ids(self, rows: list[int], draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids_BT int64, and own_B int64: the object whose vector replaces the mark in each row, or -1."""
        uniforms = torch.rand(len(rows), 3, generator=draw).tolist()
        texts, own = [], []
        for row, (u_drop, u_noun, u_template) in zip(rows, uniforms, strict=True):
            phrase, noun, instance = self.phrases[row], self.nouns[row], -1
            if noun and phrase.endswith(noun):
                head = phrase[: len(phrase) - len(noun)]
                if u_noun < self.recipe.instance_tokens:
                    phrase, instance = head + "*", self.objects[row]
                elif u_noun < self.recipe.instance_tokens + self.recipe.object_word:
                    phrase = head + "object"
            text = fill(OBJECT_TEMPLATES[int(u_template * len(OBJECT_TEMPLATES))], phrase)
            if u_drop < self.recipe.caption_dropout:
                text, instance = "", -1
            texts.append(text)
            own.append(instance)
        return torch.tensor([self._encode(text) for text in texts]), torch.tensor(own)

    def _tokenized(self, text: str) -> list[int]:
        return self.tokenizer(text, padding="max_length", truncation=True)["input_ids"]


def unet_stage(
    text: CLIPTextModel,
    unet: UNet2DConditionModel,
    recipe: PipelineTraining,
    num_objects: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Stage:
    """The second stage, on `device`: text encoder and UNet, with an extra row of the embedding table per object."""
    width = text.config.hidden_size
    table = torch.randn(num_objects, width, generator=stream(seed, "object rows")) * 0.02
    modules = {"text_encoder": text.to(device), "unet": unet.to(device, memory_format=torch.channels_last)}
    return Stage(modules, [torch.nn.Parameter(table.to(device))], recipe.unet_steps, recipe.unet_lr, recipe, seed)


def unet_step(
    stage: Stage, moments_M8hw: torch.Tensor, scaling: float, captions: Captions, alphas: torch.Tensor
) -> float:
    """One step of noise prediction with min-SNR weights, on images and mirror images alike; returns the loss.

    Source: min-SNR weighting, 2303.09556 eq. 9: w(t) = min(SNR, gamma) / SNR for a predicted noise.
    """
    recipe, device = stage.recipe, stage.device
    text, unet = stage.modules["text_encoder"], stage.modules["unet"]
    draw = stream(stage.seed, "unet step", stage.step)
    rows = torch.randint(len(moments_M8hw), (recipe.unet_batch,), generator=draw)
    ids, own = captions.ids([row % len(captions.phrases) for row in rows.tolist()], draw)
    mean, logvar = moments_M8hw[rows].float().chunk(2, 1)
    z = (mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=draw).to(device)) * scaling
    eps = torch.randn(z.shape, generator=draw).to(device)
    t = torch.randint(len(alphas), (len(z),), generator=draw).to(device)
    alpha = alphas.to(device)[t]
    abar = alpha[:, None, None, None]
    noisy = (abar.sqrt() * z + (1 - abar).sqrt() * eps).contiguous(memory_format=torch.channels_last)
    context = text_with_rows(text, ids.to(device), captions.mark, own.to(device), stage.extra[0])
    predicted = unet(noisy, t, context).sample
    snr = alpha / (1 - alpha)
    weights = snr.clamp(max=recipe.min_snr_gamma) / snr
    loss = (weights * (predicted - eps).square().mean((1, 2, 3))).mean()
    stage.update(loss)
    return loss.item()


def text_with_rows(
    text: CLIPTextModel, ids_BT: torch.Tensor, mark: int, own_B: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Text embeddings [B, T, E] of ids in which the mark in row b stands for table[own_B[b]] if own_B[b] >= 0."""

    def splice(module, inputs, embedded_BTE):
        swap = (inputs[0] == mark) & (own_B >= 0)[:, None]
        return torch.where(swap[..., None], table[own_B.clamp(min=0)][:, None], embedded_BTE)

    handle = text.get_input_embeddings().register_forward_hook(splice)
    try:
        return text(ids_BT).last_hidden_state
    finally:
        handle.remove()
