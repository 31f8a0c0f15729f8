"""A tiny random pipeline of Stable Diffusion's structure, in diffusers' folder layout: what tests load and run.

Random weights prove loading, arithmetic and equality with diffusers; they say nothing about pictures. A UNet of
normal initialization predicts almost nothing, so its last layer is scaled up until guidance and prompts matter.
"""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT = """a an the photo rendering picture image rendition of my one good bad nice cool weird small large bright dark
close up cropped object thing part screw gear bolt nut ring bottle can rusty dirty broken old new brand clean used red
green blue in on with and table"""
WORDS = tuple(TEXT.split())
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
PARTS = {"tokenizer": "CLIPTokenizer", "text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel"}


def build_tokenizer(words: tuple[str, ...] = WORDS) -> CLIPTokenizer:
    """A byte-level BPE in which every given word is one token and anything else is spelled out."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator([" ".join(words)] * 2, trainer)
    model = json.loads(trained.to_str())["model"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *(c + "</w>" for c in alphabet), *sorted(model["vocab"], key=model["vocab"].get)]
    vocab = {entry: i for i, entry in enumerate([*dict.fromkeys(entries), *special])}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], model_max_length=77)


def build_parts(
    *,
    prediction_type: str = "epsilon",
    resolution: int = 32,
    time_cond_proj_dim: int | None = None,
    tiny_vae: bool = False,
    second: bool = False,
    seed: int = 0,
    scheduler: tuple[tuple[str, object], ...] = (),
) -> dict:
    """tokenizer, text_encoder, unet, vae and the scheduler's config of a tiny pipeline; latents have a fourth of the side.

    Args:
        second: the structure of Stable Diffusion 2 (OpenCLIP's activation and padding, linear projections).
        scheduler: pairs that differ from Stable Diffusion 1.5's scheduler config.
    """
    tokenizer = build_tokenizer()
    if second:
        tokenizer.pad_token = "!"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                hidden_act="gelu" if second else "quick_gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=resolution // 4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
            time_cond_proj_dim=time_cond_proj_dim,
            use_linear_projection=second,
            upcast_attention=second,
        )
        unet.conv_out.weight.data.mul_(4)
        text_encoder.final_layer_norm.weight.data.mul_(3)
        vae = _tiny_vae() if tiny_vae else _kl_vae(resolution)
    config = SCHEDULER | {"prediction_type": prediction_type} | dict(scheduler)
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder.eval(),
        "unet": unet.eval(),
        "vae": vae.eval(),
        "scheduler": config,
    }


def _kl_vae(resolution: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=resolution,
        scaling_factor=0.18215,
    )


def _tiny_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )


def save_parts(parts: dict, folder: Path, half: bool = False) -> Path:
    """Write the parts as a diffusers folder, fp32 or fp16 safetensors; returns the folder."""
    folder = Path(folder)
    for name in ("tokenizer", "text_encoder", "unet", "vae"):
        part = parts[name].half() if half and name != "tokenizer" else parts[name]
        part.save_pretrained(folder / name)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(parts["scheduler"], indent=1))
    index = {"_class_name": "StableDiffusionPipeline"}
    index |= {name: ["diffusers" if name == "unet" else "transformers", kind] for name, kind in PARTS.items()}
    index["vae"] = ["diffusers", type(parts["vae"]).__name__]
    index["scheduler"] = ["diffusers", parts["scheduler"]["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder


@functools.cache
def pipeline_folder(half: bool = False, **options) -> Path:
    """The folder of a tiny pipeline with `build_parts`' options, made once a process and removed at its end.

    It is shared: a test that changes files copies it first.
    """
    folder = Path(tempfile.mkdtemp(prefix="tiny-pipeline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save_parts(build_parts(**options), folder, half)
