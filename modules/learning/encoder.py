"""The image encoder: a backbone chosen by resolution, a projection head for SupCon, a classifier for cross-entropy.

All parts are always built, each initialized from its own named random stream, so that arms with different methods start
from the same backbone. The probe, the OOD scores and the export read the features; the head is used only in training.

Legend: B images, R rows (views), F feature width, E embedding width, C classes, H W pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from kernels.staging import upload
from modules import config
from modules.learning.backbones import RowSplit, build_backbone
from modules.runtime import Choice, seeded

SMALL_UP_TO, RESNET18_UP_TO = 112, 160  # pixels a side


class Encoder(nn.Module):
    """Backbone, projection head and classifier; `forward` returns the output that an objective asks for."""

    def __init__(
        self, backbone: nn.Module, head_dim: int, num_classes: int, seed: int, split: RowSplit | None = None
    ) -> None:
        super().__init__()
        self.backbone, self._split = backbone, split
        self.feature_width = F_ = backbone.feature_width
        with seeded(seed, "encoder", "projection_head"):
            self.projection_head = nn.Sequential(nn.Linear(F_, F_), nn.ReLU(inplace=True), nn.Linear(F_, head_dim))
        with seeded(seed, "encoder", "classifier"):
            self.linear = nn.Linear(F_, num_classes)

    def forward(
        self, x_R3HW: torch.Tensor, output: str = "features", generated_B: Sequence[bool] | None = None
    ) -> torch.Tensor:
        """`features` [R, F], `embeddings` [R, E] or `logits` [R, C] of normalized views.

        generated_B: which images are generated, on the host; R is a multiple of B, view-major. It is used only in
        training with separate BatchNorm statistics.
        """
        features_RF = self.features(x_R3HW, generated_B)
        if output == "features":
            return features_RF
        return {"embeddings": self.head, "logits": self.classifier}[output](features_RF)

    def features(self, x_R3HW: torch.Tensor, generated_B: Sequence[bool] | None = None) -> torch.Tensor:
        """Pooled backbone features [R, F] of normalized views, in the autocast dtype."""
        if self._split is None or not self.training or generated_B is None or not any(generated_B):
            return self.backbone(x_R3HW)
        generated_R = list(generated_B) * (len(x_R3HW) // len(generated_B))
        real_first = sorted(range(len(generated_R)), key=generated_R.__getitem__)
        order_R = upload(real_first, x_R3HW.device)
        self._split.generated = sum(generated_R)
        try:
            features_RF = self.backbone(x_R3HW.index_select(0, order_R))
        finally:
            self._split.generated = 0
        return features_RF.index_select(0, order_R.argsort())

    def head(self, features_RF: torch.Tensor) -> torch.Tensor:
        """Unit-length embeddings [R, E], fp32 whatever the autocast dtype."""
        return F.normalize(self.projection_head(features_RF).float(), dim=1)

    def classifier(self, features_RF: torch.Tensor) -> torch.Tensor:
        """Logits [R, C], fp32."""
        return self.linear(features_RF).float()

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """The backbone's state for the export: statistics of real rows only; torchvision's keys for its ResNets."""
        return {key: value for key, value in self.backbone.state_dict().items() if "generated_" not in key}


def build_encoder(settings: config.Encoder, image_size: int, num_classes: int, seed: int) -> Encoder:
    """An encoder on the CPU whose weights depend only on (settings, image_size, num_classes, seed).

    The state of torch's global generator is not changed.
    """
    arch = choose_arch(settings.arch, image_size).value
    split = RowSplit() if settings.separate_batchnorm else None
    with seeded(seed, "encoder", "backbone"):
        backbone = build_backbone(arch, settings.width, split)
    encoder = Encoder(backbone, settings.head_dim, num_classes, seed, split)
    return encoder.to(memory_format=torch.channels_last) if settings.channels_last else encoder


def choose_arch(arch: str, image_size: int) -> Choice:
    """The backbone for `encoder.arch` at this resolution, with the reason to print for it."""
    if arch != "auto":
        return Choice(arch, "encoder.arch")
    if image_size <= SMALL_UP_TO:
        return Choice("small_resnet", f"auto: {image_size} px is at most {SMALL_UP_TO}")
    if image_size <= RESNET18_UP_TO:
        return Choice("resnet18", f"auto: {image_size} px is at most {RESNET18_UP_TO}")
    return Choice("resnet50", f"auto: {image_size} px is above {RESNET18_UP_TO}")
