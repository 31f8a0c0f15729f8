"""Prompt embeddings of requests, with the arithmetic on class tokens that some near-OOD recipes need.

Fixed prompts are embedded once and kept in the bank. Mixed, noised and outlying tokens change the text encoder's input,
so such prompts are embedded when their image enters a slot.

Shapes: C classes, K vectors a token, E text width, T tokens of a prompt, N candidates.
"""

import hashlib

import torch

from kernels.staging import upload
from modules.diffusion.requests import Prompt, Request
from modules.diffusion.tokens import INITIALIZER, PromptBank
from modules.errors import DataError
from modules.runtime import stream


class Conditioning:
    """Maps a request to the embedding of its prompt."""

    def __init__(self, bank: PromptBank, seed: int):
        self.bank, self.seed = bank, seed
        self.tokens = tokens_digest(bank.vectors_CKE)

    def __call__(self, request: Request) -> torch.Tensor:
        """The embedding [T, E] of a request's prompt.

        Raises:
            DataError: the request was made with other class tokens than the bank's.
        """
        if request.tokens != self.tokens:
            raise DataError(
                f"image {request.image_index} was made with class tokens {request.tokens[:16] or 'none'}, these are "
                f"{self.tokens[:16] or 'none'}; use the tokens of its run"
            )
        prompt = request.prompt
        if not prompt.template:
            return self.bank.empty()
        if prompt.fixed:
            label = prompt.classes[0] if prompt.classes else INITIALIZER
            return self.bank.fixed(prompt.template, prompt.condition, label)
        draw = stream(self.seed, "token", *request.identity)
        return self.bank.mixed(prompt.template, prompt.condition, token_vectors(prompt, self.bank.vectors_CKE, draw))

    def empty(self) -> torch.Tensor:
        """The embedding [T, E] of the empty prompt."""
        return self.bank.empty()


def token_vectors(prompt: Prompt, vectors_CKE: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """The token vectors [K, E] of a prompt: sum_c w_c V_c, then noise or a move to low density if the prompt has them.

    Noise: V + noise ||V|| / sqrt(E) g with g standard normal, so that `noise` is about the ratio of the two norms.
    """
    mixed_KE = sum(weight * vectors_CKE[label] for label, weight in zip(prompt.classes, prompt.weights, strict=True))
    if prompt.noise:
        g = upload(torch.randn(mixed_KE.shape, generator=draw), mixed_KE.device)
        mixed_KE = mixed_KE + prompt.noise * mixed_KE.norm(dim=-1, keepdim=True) / mixed_KE.shape[-1] ** 0.5 * g
    if prompt.outlier_quantile:
        mixed_KE = outlying_vectors(mixed_KE, vectors_CKE, prompt.outlier_quantile, draw)
    return mixed_KE


def outlying_vectors(
    vectors_KE: torch.Tensor, vectors_CKE: torch.Tensor, quantile: float, draw: torch.Generator
) -> torch.Tensor:
    """Token vectors [K, E] near a class's own, in a direction where class tokens are sparse.

    N = 1 / quantile candidates (at least 2) are drawn in random directions at distance r, the distance of the nearest
    other class token (or the token's norm if there is none). The candidate x of lowest density
    sum_c exp(-||x - V_c||^2 / 2 r^2) is returned.
    Source: the sampling idea of NPOS (2303.02966) and Dream-OOD (2309.13415), applied to class tokens.
    """
    tokens_CF, own_F = vectors_CKE.flatten(1), vectors_KE.flatten()
    distance_C = (tokens_CF - own_F).norm(dim=1)
    nearest = torch.where(distance_C > 1e-6 * own_F.norm(), distance_C, torch.inf).min()
    radius = torch.where(nearest.isfinite(), nearest, own_F.norm())
    count = max(2, round(1 / quantile))
    directions_NF = upload(torch.randn(count, own_F.numel(), generator=draw), own_F.device)
    candidates_NF = own_F + radius * torch.nn.functional.normalize(directions_NF, dim=1)
    log_density_N = (-0.5 * (torch.cdist(candidates_NF, tokens_CF) / radius).square()).logsumexp(1)
    rarest = log_density_N.argmin(keepdim=True)
    return candidates_NF.index_select(0, rarest).view_as(vectors_KE)


def tokens_digest(vectors_CKE: torch.Tensor | None) -> str:
    """sha256 of class vectors; "" if there are none."""
    if vectors_CKE is None:
        return ""
    return hashlib.sha256(vectors_CKE.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
