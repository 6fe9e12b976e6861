# SPDX-License-Identifier: Apache-2.0
"""Make `tlora.safetensors` with LyCORIS: what its T-LoRA adds at some timesteps, trained away from its start.

`make test-oracles` makes it anew.
"""

from pathlib import Path

import torch
from lycoris.modules import tlora
from safetensors.torch import save_file
from torch import nn

TIMESTEPS = (0, 130, 480, 999)
KINDS = ("principal", "last", "middle")


def main(out: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(7, 6), torch.randn(3, 7)
    held = {"weight": base.weight.data, "bias": base.bias.data, "x": x}
    for kind in KINDS:
        module = tlora.TLoraModule("layer", base, lora_dim=4, alpha=6, sig_type=kind)
        start = dict(P0=module.base_p, lambda0=module.base_lambda[0], Q0=module.base_q)
        held |= {f"{kind}.{name}": t.clone() for name, t in start.items()}
        with torch.no_grad():
            for p in (module.p_layer.weight, module.lambda_layer, module.q_layer.weight):
                p.add_(torch.randn_like(p), alpha=0.3)
        now = dict(P=module.p_layer.weight.data, Q=module.q_layer.weight.data) | {"lambda": module.lambda_layer.data[0]}
        held |= {f"{kind}.{name}": t.clone() for name, t in now.items()}
        for t in TIMESTEPS:
            tlora.set_timestep_mask(tlora.compute_timestep_mask(t, 1000, 4, 1, 0.7))
            held[f"{kind}.{t}"] = module.get_diff_weight()[0].detach().clone()
    save_file({name: t.contiguous() for name, t in held.items()}, out / "tlora.safetensors")
