"""Reports what each token has learned: its norm, its distance from the initializer, and its denoising loss against the
initializer's.

"The token has no effect" is the most common complaint about textual inversion, and the training loss does not show it,
because it depends far more on the timestep than on the token. So both losses are measured on images that inversion
never saw, with the same latents, noise and timesteps, and their difference is reported with its standard error.

Shapes: D images, C classes, N draws, K vectors a token, E embedding width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from modules.diffusion.denoising import Denoising
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.prompts import fill, trained_words
from modules.diffusion.tokens import Tokens, initializer_rows, vocabulary_norms
from modules.runtime import stream

TEMPLATE = "a photo of a {}"
UNMOVED = 0.05  # relative distance to the initializer below which a token is called unmoved


@torch.no_grad()
def token_report(
    pipeline: StableDiffusion,
    tokens: Tokens,
    moments_D8hw: torch.Tensor,
    labels_D: Sequence[int],
    *,
    draws: int = 8,
    batch_size: int = 32,
) -> list[dict]:
    """One row per class: class, placeholder, initializer, and these figures.

    norm                mean over the K vectors of ||V_y||
    vocabulary_norm     median of ||row|| over the rows of trained words, or over all rows if no words are listed
    cosine              mean over the K vectors of their cosine to the initializer's row
    moved               mean over the K vectors of ||V_y - initializer|| / ||initializer||
    loss_token          held-out denoising loss with the token, mean over `draws` (images in turn, t spread evenly)
    loss_initializer    the same latents, noise and t with the initializer word
    gain, gain_se       1 - loss_token / loss_initializer, and its standard error from the paired differences
    images              held-out images used; 0 leaves the losses None
    note                "" or what looks wrong

    `moments_D8hw` are VAE moments of images that inversion did not use (val), `labels_D` their class ids.
    """
    vocabulary_norm = vocabulary_norms(pipeline, trained_words(pipeline.source)).median().item()
    words = [tokens.initializer_of(c) for c in range(len(tokens.classes))]
    initial_CE = initializer_rows(pipeline, words).cpu()
    own = [[row for row, label in enumerate(labels_D) if label == c] for c in range(len(tokens.classes))]
    losses = _held_out(pipeline, tokens, moments_D8hw, own, draws, batch_size)
    table = []
    for c, (name, token) in enumerate(zip(tokens.classes, tokens.placeholders, strict=True)):
        vectors_KE, initial_E = tokens.vectors_CKE[c].cpu(), initial_CE[c]
        row = {
            "class": name,
            "placeholder": token,
            "initializer": words[c],
            "norm": vectors_KE.norm(dim=1).mean().item(),
            "vocabulary_norm": vocabulary_norm,
            "cosine": F.cosine_similarity(vectors_KE, initial_E[None]).mean().item(),
            "moved": ((vectors_KE - initial_E).norm(dim=1).mean() / initial_E.norm()).item(),
            "loss_token": None,
            "loss_initializer": None,
            "gain": None,
            "gain_se": None,
            "images": min(draws, len(own[c])),
        }
        if c in losses:
            token_N, initializer_N = losses[c]
            base = initializer_N.mean().item()
            row |= {
                "loss_token": token_N.mean().item(),
                "loss_initializer": base,
                "gain": 1 - token_N.mean().item() / base,
                "gain_se": (token_N - initializer_N).std().item() / len(token_N) ** 0.5 / base,
            }
        table.append(row | {"note": _note(row)})
    return table


def _note(row: dict) -> str:
    """What looks wrong in a row of the report; "" if nothing does."""
    if row["moved"] < UNMOVED:
        return "did not move from the initializer; raise inversion.images_per_class or inversion.lr"
    if row["images"] == 0:
        return "no held-out image of this class, its effect is unknown"
    if row["gain"] <= 0:
        return "no better than the initializer word on held-out images"
    return ""


def _held_out(
    pipeline: StableDiffusion,
    tokens: Tokens,
    moments_D8hw: torch.Tensor,
    own: list[list[int]],
    draws: int,
    batch_size: int,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Class -> (loss_N with the token, loss_N with the initializer) over the same N draws, float32 on the CPU."""
    denoising = Denoising(pipeline)
    token_context = pipeline.embed_vectors([fill(TEMPLATE, "*")] * len(own), tokens.vectors_CKE.to(pipeline.device))
    word_context = pipeline.embed([fill(TEMPLATE, tokens.initializer_of(c)) for c in range(len(own))])
    plan = [(c, rows[n % len(rows)], n) for c, rows in enumerate(own) if rows for n in range(draws)]
    pairs = []
    for start in range(0, len(plan), batch_size):
        part = plan[start : start + batch_size]
        moments = moments_D8hw[[row for _, row, _ in part]].to(pipeline.device)
        shape = (2, moments.shape[1] // 2, *moments.shape[2:])
        noises = [
            torch.randn(shape, generator=stream(tokens.seed, "token report", tokens.classes[c], n)) for c, _, n in part
        ]
        latent_noise, eps = torch.stack(noises, 1).to(pipeline.device)
        u = torch.tensor([(n + 0.5) / draws for _, _, n in part], device=pipeline.device)
        noised = denoising.noised(pipeline.sample_latents(moments, latent_noise), eps, u)
        rows = [c for c, _, _ in part]
        contexts = (token_context[rows], word_context[rows])
        pairs.append(torch.stack([denoising.losses(*noised, context) for context in contexts]).cpu())
    measured = [c for c, rows in enumerate(own) if rows]
    losses_2CN = torch.cat(pairs, 1).view(2, len(measured), draws) if pairs else torch.empty(2, 0, draws)
    return {c: (losses_2CN[0, i], losses_2CN[1, i]) for i, c in enumerate(measured)}
