# SPDX-License-Identifier: Apache-2.0
"""Memory of a training step over experts in 8 bits, beside the same over dense ones (the floor), in fresh processes.

PEFT has none: it adapts no experts in codes.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from benchmarks.measure import Effort, Goal, Row

SIZES = dict(hidden_size=768, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
EXPERTS, CHUNK = 32, 2**24
CODE = """
import torch
torch.set_num_threads(1)
from transformers import MixtralConfig, MixtralModel
from transformers.integrations.finegrained_fp8 import FP8Experts
import graft
from benchmarks.experts import TARGETS
from graft.kernels import experts

def resident(name):
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status[name].split()[0]) * 1024

experts.BUDGET = {chunk}
before = resident("VmRSS")
config = MixtralConfig(vocab_size=64, num_local_experts={experts}, num_experts_per_tok=2, **{sizes})
with torch.device("meta"):
    model = MixtralModel(config)
    if {packed}:
        for layer in model.layers:
            layer.mlp.experts = FP8Experts(config, (128, 128))
model = model.to_empty(device="cpu")
for name, t in (*model.named_parameters(), *model.named_buffers()):
    t.data.view(-1)[: t.numel()] = 0.01  # touched, so that it counts
model = graft.get_peft_model(model, graft.LoraConfig(r=8, target_modules=[], target_parameters=TARGETS)).train()
x = torch.randn(2, 64, {width}, requires_grad=True)
model(inputs_embeds=x, use_cache=False).last_hidden_state.square().mean().backward()  # gradients stay
del x
built = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # count from here
x = torch.randn(2, 64, {width}, requires_grad=True)
model(inputs_embeds=x, use_cache=False).last_hidden_state.square().mean().backward()
print(resident("VmHWM") - before, resident("VmHWM") - built)
"""


@dataclass
class Peak:
    """`beyond`: what the step takes beside the model and its gradients."""

    what: str
    beyond: bool
    goal: Goal
    long: bool = True

    def run(self, effort: Effort) -> Row:
        own, floor = peak(True)[self.beyond], peak(False)[self.beyond]
        return Row(self.what, {"graft": [own], "floor": [floor + CHUNK * self.beyond]}, self.goal, unit="B")


def peak(packed: bool) -> tuple[float, float]:
    """Return the bytes of a step with the model, and without it."""
    code = CODE.format(packed=packed, chunk=CHUNK, experts=EXPERTS, sizes=SIZES, width=SIZES["hidden_size"])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    whole, beyond = map(float, done.stdout.split()[-2:])
    return whole, beyond


BENCHES = [
    Peak("peak memory, LoRA step on 32 experts in FP8 (floor: the dense base)", False, Goal(over_floor=0.5)),
    Peak("the same beside the model (floor: the dense base's, and one chunk)", True, Goal(over_floor=1.3)),
]
BENCHES = BENCHES if sys.platform.startswith("linux") else []  # elsewhere there is no /proc
