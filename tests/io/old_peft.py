# SPDX-License-Identifier: Apache-2.0
"""Make the files in `old_peft/`: adapters on stacks of experts that old releases of PEFT wrote, and what they do.

`python -m tests.io.old_peft`, with PEFT of that release installed, and for 0.17.1 without its import of `HybridCache`,
which transformers 5 does not have.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

FOLDER = Path(__file__).parent / "old_peft"
KINDS = {"plain": None, "transposed": True, "llama4": False}  # the stack is (n, out, in), or (n, in, out), said or not
INPUT = torch.linspace(-1, 1, 2 * 3 * 4).view(2, 3, 4)


class Experts(nn.Module):
    """Two experts: of 4 features to 4, which shapes do not tell apart, and to 2."""

    def __init__(self, is_transposed):
        super().__init__()
        self.stored = "in, out" if is_transposed is not None else "out, in"
        if is_transposed:
            self.is_transposed = True
        for name, shape in (("up_proj", (2, 4, 4)), ("down_proj", (2, 2, 4))):
            values = torch.arange(torch.Size(shape).numel()).mul(0.7).sin().view(shape)
            self.register_parameter(name, nn.Parameter(values if self.stored == "out, in" else values.mT.contiguous()))

    def forward(self, x):  # (2, rows, 4)
        up, down = (W.mT if self.stored == "out, in" else W for W in (self.up_proj, self.down_proj))
        return (x @ up).tanh() @ down


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.experts = Experts(KINDS[kind])

    def forward(self, x):
        return self.experts(x)


def make():
    import peft

    outputs = {}
    for kind in KINDS:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=1, target_modules=[], target_parameters=["experts.up_proj"], init_lora_weights=False)
        model = peft.get_peft_model(Model(kind), config)
        folder = FOLDER / peft.__version__
        model.save_pretrained(folder / kind)
        (folder / kind / "README.md").unlink()
        with torch.no_grad():
            outputs[kind] = model(INPUT)
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    make()
