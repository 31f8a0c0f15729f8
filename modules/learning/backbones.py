"""The backbones that turn views into features: our own small ResNet for small images, torchvision's for large ones.

The stem must suit the resolution: one that reads a 64-pixel image at full resolution costs 16 times as much as one made
for that size, and one made for 224 pixels discards most of a 64-pixel image before the first block. BatchNorm can keep
separate statistics for generated rows, which carry the decoder's traces. Legend: R rows, F feature width, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class RowSplit:
    """The number of generated rows at the end of the current batch; shared by all norms of a backbone."""

    generated: int = 0


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that normalizes the last `split.generated` training rows separately, with their own running statistics.

    Scale and shift are shared. In evaluation mode all rows use the statistics of real rows.
    Source: the auxiliary BatchNorm of Xie et al. 2020 (1911.09665).
    """

    def __init__(self, num_features: int, *, split: RowSplit) -> None:
        super().__init__(num_features)
        self.split = split
        self.register_buffer("generated_mean", torch.zeros(num_features))
        self.register_buffer("generated_var", torch.ones(num_features))

    def forward(self, x_RFHW: torch.Tensor) -> torch.Tensor:
        generated = self.split.generated if self.training else 0
        if not generated:
            return super().forward(x_RFHW)
        apart_RFHW = F.batch_norm(
            x_RFHW[-generated:],
            self.generated_mean,
            self.generated_var,
            self.weight,
            self.bias,
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        if generated == len(x_RFHW):
            return apart_RFHW
        return torch.cat([super().forward(x_RFHW[:-generated]), apart_RFHW])


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, as in ResNet-18. Source: He et al. 2015 (1512.03385) figure 5, left."""

    def __init__(self, width_in: int, width: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), norm(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x), inplace=True)


class SmallResNet(nn.Module):
    """Features [R, 8 width] of small images [R, 3, H, W]: stride-2 stem, max-pool, one block per width x (1, 2, 4, 8).

    33 MFLOP (2 x MAC) per 64-pixel image at width 32. The pool is kept even for such small images: without it, even
    width 24 takes twice the time (forward and backward of 128 images, one thread).
    """

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = norm(width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.blocks = nn.Sequential(
            Block(width, width, 1, norm),
            Block(width, 2 * width, 2, norm),
            Block(2 * width, 4 * width, 2, norm),
            Block(4 * width, 8 * width, 2, norm),
        )
        self.feature_width = 8 * width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_R3HW: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x_R3HW)), inplace=True)
        return self.blocks(self.pool(x)).mean(dim=(2, 3))


def build_backbone(arch: str, width: int, split: RowSplit | None) -> nn.Module:
    """The backbone `arch` (small_resnet, resnet18 or resnet50), with `feature_width` set; weights from the global RNG.

    split: tells which rows have separate BatchNorm statistics; None for one set of statistics.
    """
    norm = nn.BatchNorm2d if split is None else partial(SplitBatchNorm2d, split=split)
    if arch == "small_resnet":
        return SmallResNet(width, norm)
    from torchvision import models  # the import takes half a second; small_resnet does not need it

    backbone = getattr(models, arch)(weights=None, norm_layer=norm)
    backbone.feature_width = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return backbone
