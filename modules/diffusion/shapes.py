"""The configurations of Stable Diffusion 1.x and 2.x, for single files and for pipelines of random weights.

A .safetensors file in CompVis layout holds weights and no configuration; these are the configurations that all models
of a family share. The same shapes filled with random numbers replace a checkpoint when only time is measured, which
does not depend on the values (as long as they are neither zero nor NaN).
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
FEW_STEPS = {  # scheduler settings for weights distilled to a few steps, replacing those of their base model
    "lcm": {"_class_name": "LCMScheduler", "timestep_spacing": "leading"},
    "turbo": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
}
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
TEXT_2 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of OpenCLIP's 24: Stable Diffusion 2 reads the output of the last but one
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
UNET_2 = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}


def shapes_of(family: str, prediction_type: str = "epsilon") -> dict[str, dict]:
    """The configurations of unet, vae, text_encoder and scheduler for family sd1 or sd2.

    Stable Diffusion 2 with v-prediction was trained at 768 px, all others at 512.
    """
    side = 96 if family == "sd2" and prediction_type == "v_prediction" else 64
    second = family == "sd2"
    return {
        "unet": UNET | (UNET_2 if second else {}) | {"sample_size": side},
        "vae": VAE,
        "text_encoder": TEXT | (TEXT_2 if second else {}),
        "scheduler": SCHEDULER | {"prediction_type": prediction_type},
    }


def write_configs(shapes: dict[str, dict], folder: Path) -> Path:
    """Write configurations to a folder in the layout that diffusers' single-file loaders read; returns the folder."""
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    for name, config in shapes.items():
        part = folder / name
        part.mkdir(parents=True)
        if name == "text_encoder":
            config = CLIPTextConfig(**config).to_dict()
        elif name in classes:
            config = {"_class_name": classes[name]} | config
        (part / ("scheduler_config.json" if name == "scheduler" else "config.json")).write_text(json.dumps(config))
    return folder


def random_parts(family: str, device: torch.device, dtype: torch.dtype) -> dict:
    """tokenizer, text_encoder, unet, vae and scheduler of a family's exact shape, with random weights on the device.

    Matrices and convolution kernels are normal with variance 1 / fan-in, embeddings normal with standard deviation .02;
    biases are 0 and norms the identity. They are drawn on the device, because there are about 1e9 numbers.
    """
    shapes = shapes_of(family)
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(**shapes["unet"]),
            "vae": AutoencoderKL(**shapes["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**shapes["text_encoder"])),
        }
    generator = torch.Generator(device).manual_seed(0)
    for model in models.values():
        model.to_empty(device=device).to(dtype)
        for module in model.modules():
            _fill(module, generator)
    length = shapes["text_encoder"]["max_position_embeddings"]
    models["text_encoder"].embeddings.position_ids = torch.arange(length, device=device)[None]
    return models | {"tokenizer": letter_tokenizer(), "scheduler": shapes["scheduler"]}


def _fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Fill a module's own parameters with random values."""
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            parameter.data.zero_()
        elif isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            parameter.data.fill_(1.0)
        else:
            spread = 0.02 if isinstance(module, torch.nn.Embedding) else parameter[0].numel() ** -0.5
            parameter.data.normal_(0.0, spread, generator=generator)


def letter_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of the usual vocabulary size that knows only letters; the other entries are never used."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *(letter + "</w>" for letter in letters)]
    entries += [f"<unused-{i}>" for i in range(TEXT["vocab_size"] - 2 - len(entries))]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: i for i, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
