"""Textual inversion of all classes together: learns a few vectors per class by denoising the class's training images.

V_y* = argmin over V_y of E ||target - model(z_t, t, c(template(V_y)))||^2, where the target is eps, or
v = sqrt(abar) eps - sqrt(1-abar) z_0 if the scheduler says v_prediction. UNet, VAE and text encoder stay frozen; the
new vectors are a separate parameter, so no row of the vocabulary can move.
Source: Textual Inversion, 2208.01618, eq. 2.

All classes are learned at once, because a step costs by its rows, not by its classes: a batch visits several classes
with about ROWS_PER_VISIT images each, under one template, so that each class's prompt is encoded once per step. A class
that a batch does not visit keeps its vectors and its Adam state bit for bit. Within a visit the timesteps are
stratified (2107.00630, app. I.1), which keeps the marginal uniform and lowers the variance of the gradient.

The published learning rate, 5e-4 scaled by a batch of 4, is `inversion.lr` = 2e-3 at 4 rows of a class; for other row
counts it is scaled by the square root, the rule for Adam (2205.10287).

Shapes: F flips (the image, its mirror image), D images, B rows, C classes, P classes of a batch, K vectors a token,
E embedding width, h w the latent grid, T tokens.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from kernels.staging import upload
from modules.config import Inversion as Settings
from modules.data.cache import digest_tensor
from modules.diffusion.attention import install
from modules.diffusion.denoising import Denoising, stratified
from modules.diffusion.frozen import freeze_layers
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.prompts import KEYWORDS, OBJECT_TEMPLATES, fill, placeholder
from modules.diffusion.tokens import Tokens, initializer_rows
from modules.errors import ConfigError, DataError, NonFinite, OutOfMemory, first_line
from modules.memory import ran_out
from modules.runtime import stream

ALGORITHM = 3  # part of the cache key; increment it when the same settings would learn other vectors
ROWS_PER_VISIT = 4  # images of a class in a batch; the batch size of the published code
WARMUP_VISITS = 5  # a class's learning rate rises linearly over this many visits
BETAS, EPSILON = (0.9, 0.999), 1e-8
HALF_PRECISION_SCALE = 256.0  # loss scale, so that gradients of a mean over 16,384 latents do not underflow in fp16

Progress = Callable[[int, int, str], None]


def token_cache_key(
    pipeline: StableDiffusion,
    pixels_DHWC: torch.Tensor,
    labels: Sequence[str],
    settings: Settings,
    seed: int,
    initializers: Sequence[str] = (),
) -> str:
    """sha256 of everything that learned vectors depend on; equal keys mean equal tokens.

    `pixels_DHWC` (uint8) are the training images as passed to inversion, cropped and resized; `labels` are their class
    names; `initializers` are the words of the classes if each has its own. Changing the seed, the shots, an image, a
    crop, a label, the pipeline, a word, a setting or the naming of placeholders changes the key.
    """
    parts = {
        "algorithm": ALGORITHM,
        "pipeline": [pipeline.digest, pipeline.resolution, str(pipeline.dtype)],
        "images": digest_tensor(pixels_DHWC),
        "labels": list(labels),
        "placeholders": sorted({placeholder(label) for label in labels}),  # token files name their placeholder
        "settings": asdict(settings),
        "templates": OBJECT_TEMPLATES,
        "seed": seed,
    } | ({"initializers": list(initializers)} if initializers else {})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def schedule(labels_D: Sequence[int], classes: Sequence[str], images_per_class: int, seed: int) -> list[int]:
    """The training rows of the whole inversion in order: C x images_per_class rows, exactly images_per_class per class.

    Each round visits every class once, in random order, with ROWS_PER_VISIT images. The images of a class are shuffled
    anew for each pass, and all of them are used before any is used again.

    Raises: DataError for a class without a training image.
    """
    streams = []
    for label, name in enumerate(classes):
        own = torch.tensor([row for row, other in enumerate(labels_D) if other == label], dtype=torch.long)
        if not len(own):
            raise DataError(f"class {name!r} has no training image to learn its token from; add some or drop the class")
        draw = stream(seed, "inversion images", name)
        cycles = [own[torch.randperm(len(own), generator=draw)] for _ in range(math.ceil(images_per_class / len(own)))]
        streams.append(torch.cat(cycles)[:images_per_class].tolist())
    rows = []
    for start in range(0, images_per_class, ROWS_PER_VISIT):
        for label in torch.randperm(len(classes), generator=stream(seed, "inversion round", start)).tolist():
            rows += streams[label][start : start + ROWS_PER_VISIT]
    return rows


class Inversion:
    """Textual inversion in progress: call `step` until `done` equals `steps`, then `tokens`.

    `moments_FD8hw` are the VAE moments of the training images and, if `settings.flip` > 0, of their mirror images;
    every use samples a new latent from them. Every vector starts as the embedding row of `settings.initializer`, or of
    its class's word in `initializers`. `say` is called if a batch does not fit in memory and is split.

    Raises: ConfigError for an initializer without a trained row of its own, DataError for a class without an image.
    """

    def __init__(
        self,
        pipeline: StableDiffusion,
        moments_FD8hw: torch.Tensor,
        labels_D: Sequence[int],
        classes: Sequence[str],
        settings: Settings,
        seed: int,
        templates: Sequence[str] = OBJECT_TEMPLATES,
        initializers: Sequence[str] = (),
        say: Callable[[str], None] = lambda text: None,
    ):
        if settings.initializer == KEYWORDS and not initializers:
            raise ConfigError(
                f"inversion.initializer is {KEYWORDS!r}, but nothing told the keywords of the classes; name a noun such as "
                "'object'"
            )
        if settings.flip > 0 and len(moments_FD8hw) < 2:
            raise ValueError(
                f"moments_FD8hw: {tuple(moments_FD8hw.shape)} lacks the mirror images inversion.flip asks for"
            )
        self.pipeline, self.moments_FD8hw, self.labels_D = pipeline, moments_FD8hw, [int(c) for c in labels_D]
        self.classes, self.settings, self.seed, self.templates = tuple(classes), settings, seed, tuple(templates)
        self.order = schedule(self.labels_D, self.classes, settings.images_per_class, seed)
        self.steps = math.ceil(len(self.order) / settings.batch_size)
        self.micro_batch = settings.batch_size
        self.say = say
        self.done = 0
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            freeze_layers(module.requires_grad_(False).eval())
        install(pipeline.unet)  # the engine's attention, kernels/attention.py: its 16-bit backward is fast on a CPU too
        self.denoising = Denoising(pipeline)
        self.initializers = tuple(initializers)
        rows_CE = initializer_rows(pipeline, self.initializers or (settings.initializer,) * len(self.classes))
        self.vectors_CKE = rows_CE[:, None].repeat(1, settings.num_vectors, 1)
        self.exp_avg_CKE = torch.zeros_like(self.vectors_CKE)
        self.exp_avg_sq_CKE = torch.zeros_like(self.vectors_CKE)
        self.visits_C = [0] * len(classes)
        self.finite = torch.ones((), dtype=torch.bool, device=rows_CE.device)

    def step(self) -> torch.Tensor:
        """Learn from the next batch; returns its mean denoising loss, float32 [], on the device.

        After a loss or gradient that is not finite the vectors no longer change, and the next `check_finite` raises.
        This way no step has to wait for the device.

        Raises: OutOfMemory if not even one row fits.
        """
        rows = self.order[self.done * self.settings.batch_size :][: self.settings.batch_size]
        labels_B = [self.labels_D[row] for row in rows]
        present = sorted(set(labels_B))
        counts = [labels_B.count(label) for label in present]
        draw = stream(self.seed, "inversion", self.done)
        template = self.templates[torch.randint(len(self.templates), (), generator=draw)]
        z_B4hw, target_B4hw, t_B = self._noised(rows, stratified(labels_B, draw), draw)

        index_P = self._device(present)
        vectors_PKE = self.vectors_CKE.index_select(0, index_P).requires_grad_()
        context_PTE = self.pipeline.embed_vectors([fill(template, "*")] * len(present), vectors_PKE)
        position_B = self._device([present.index(label) for label in labels_B])
        weight_B = self._device([1 / counts[present.index(label)] for label in labels_B])
        gradient_PTE, loss_B = self._denoise(z_B4hw, target_B4hw, t_B, context_PTE.detach(), position_B, weight_B)
        (gradient_PKE,) = torch.autograd.grad(context_PTE, vectors_PKE, gradient_PTE)
        self.finite &= loss_B.isfinite().all()
        self._update(present, index_P, gradient_PKE, counts)
        self.done += 1
        return loss_B.mean()

    def _noised(self, rows: list[int], u_B: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, ...]:
        """z_t, target and t of a batch, with a new latent, new noise and a new decision to mirror for each row."""
        flips = (torch.rand(len(rows), generator=draw) < self.settings.flip).long().tolist()
        index_2B = upload([flips, rows], self.moments_FD8hw.device)
        moments_B8hw = upload(self.moments_FD8hw[index_2B[0], index_2B[1]], self.pipeline.device)
        shape = (len(rows), moments_B8hw.shape[1] // 2, *moments_B8hw.shape[2:])
        latent_noise, eps = self._device(torch.randn(2, *shape, generator=draw))
        z_0 = self.pipeline.sample_latents(moments_B8hw, latent_noise)
        return self.denoising.noised(z_0, eps, self._device(u_B))

    def _denoise(self, z, target, t, context_PTE, position_B, weight_B) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of sum_B weight_B loss_B with respect to context_PTE, and loss_B, in chunks that fit memory."""
        while True:
            try:
                return self._chunks(z, target, t, context_PTE, position_B, weight_B)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                reason = first_line(error)
            if self.micro_batch == 1:
                half = " or set pipeline.dtype to 16 bits" if self.pipeline.dtype == torch.float32 else ""
                raise OutOfMemory(
                    "textual inversion does not fit with a single row at "
                    f"{self.pipeline.resolution} px; lower pipeline.resolution{half} ({reason})"
                )
            whole, self.micro_batch = self.micro_batch, math.ceil(self.micro_batch / 2)
            self.say(
                f"{whole} rows of inversion.batch_size {self.settings.batch_size} ran out of memory at once: {self.micro_batch} "
                "at a time from here on, which changes the time and not what is learned"
            )
            torch.cuda.empty_cache()

    def _chunks(self, z, target, t, context_PTE, position_B, weight_B) -> tuple[torch.Tensor, torch.Tensor]:
        scale = HALF_PRECISION_SCALE if context_PTE.dtype == torch.float16 else 1.0
        context_PTE.requires_grad_()
        gradient_PTE, losses = torch.zeros_like(context_PTE, dtype=torch.float32), []
        for chunk in torch.arange(len(z)).split(self.micro_batch):
            part = slice(chunk[0], chunk[-1] + 1)
            context_BTE = context_PTE.index_select(0, position_B[part])
            loss = self.denoising.losses(z[part], target[part], t[part], context_BTE)
            (gradient,) = torch.autograd.grad((loss * weight_B[part]).sum() * scale, context_PTE)
            gradient_PTE += gradient.float()
            losses.append(loss.detach())
        return gradient_PTE.to(context_PTE.dtype), torch.cat(losses)

    def _update(self, present: list[int], index_P: torch.Tensor, gradient_PKE: torch.Tensor, counts: list[int]) -> None:
        """Adam on the vectors of the classes present, each with its own step count; nothing moves if not finite.

        m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g^2; V <- V - lr m / (1-b1^n) / (sqrt(v / (1-b2^n)) + eps)
        Source: 1412.6980, algorithm 1. The loss scale of half precision cancels in m / sqrt(v).
        """
        for label in present:
            self.visits_C[label] += 1
        visits = [self.visits_C[label] for label in present]
        rate = [
            self.settings.lr * math.sqrt(count / ROWS_PER_VISIT) * min(1.0, n / WARMUP_VISITS) / (1 - BETAS[0] ** n)
            for count, n in zip(counts, visits, strict=True)
        ]
        rate_P11 = self._device(rate)[:, None, None]
        correction_P11 = self._device([1 - BETAS[1] ** n for n in visits])[:, None, None]
        gradient_PKE = gradient_PKE.float()
        exp_avg = self.exp_avg_CKE[index_P].lerp(gradient_PKE, 1 - BETAS[0])
        exp_avg_sq = self.exp_avg_sq_CKE[index_P].lerp(gradient_PKE.square(), 1 - BETAS[1])
        vectors = self.vectors_CKE[index_P] - rate_P11 * exp_avg / ((exp_avg_sq / correction_P11).sqrt() + EPSILON)
        self.finite &= gradient_PKE.isfinite().all()
        for old, new in (
            (self.vectors_CKE, vectors),
            (self.exp_avg_CKE, exp_avg),
            (self.exp_avg_sq_CKE, exp_avg_sq),
        ):
            old[index_P] = torch.where(self.finite, new, old[index_P])

    def _device(self, values) -> torch.Tensor:
        """Host values on the device, without waiting for it."""
        return upload(values, self.pipeline.device)

    def check_finite(self) -> None:
        """Wait for the device and check that every loss and gradient so far was finite.

        Raises: NonFinite if a loss or gradient was not finite in any step so far.
        """
        if not bool(self.finite):
            raise NonFinite(
                f"textual inversion: a loss or gradient was not finite within the first {self.done} steps "
                f"({self.pipeline.dtype}); choose pipeline.dtype fp32, or a lower inversion.lr"
            )

    def tokens(self) -> Tokens:
        """The learned vectors and what they were made from; raises NonFinite rather than return broken ones."""
        self.check_finite()
        return Tokens(
            classes=self.classes,
            vectors_CKE=self.vectors_CKE.detach().cpu().clone(),
            base_model=self.pipeline.digest,
            initializer=self.settings.initializer,
            images_seen=min(self.settings.images_per_class, self.done * self.settings.batch_size // len(self.classes)),
            seed=self.seed,
            initializers=self.initializers,
        )

    def state_dict(self) -> dict:
        """Everything that later steps read; on a CPU a resumed run equals an uninterrupted one bit for bit."""
        self.check_finite()
        return {
            "done": self.done,
            "micro_batch": self.micro_batch,
            "visits": list(self.visits_C),
            "vectors": self.vectors_CKE.clone(),
            "exp_avg": self.exp_avg_CKE.clone(),
            "exp_avg_sq": self.exp_avg_sq_CKE.clone(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`; raises DataError if the shape of its vectors differs."""
        if state["vectors"].shape != self.vectors_CKE.shape:
            raise DataError(
                f"inversion state of shape {tuple(state['vectors'].shape)} for vectors {tuple(self.vectors_CKE.shape)}; "
                "it belongs to other settings"
            )
        self.done, self.micro_batch, self.visits_C = state["done"], state["micro_batch"], list(state["visits"])
        self.vectors_CKE.copy_(state["vectors"])
        self.exp_avg_CKE.copy_(state["exp_avg"])
        self.exp_avg_sq_CKE.copy_(state["exp_avg_sq"])


def learn(inversion: Inversion, progress: Progress | None = None, log_every: int = 10) -> Tokens:
    """Run an inversion from its current step to its end; returns the tokens.

    Raises: NonFinite at the first log after a loss or gradient that was not finite.
    """
    while inversion.done < inversion.steps:
        loss = inversion.step()
        if inversion.done % log_every == 0 or inversion.done == inversion.steps:
            inversion.check_finite()
            if progress:
                progress(inversion.done, inversion.steps, f"denoising loss {loss.item():.4f}")
    return inversion.tokens()
