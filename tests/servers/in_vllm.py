# SPDX-License-Identifier: Apache-2.0
"""What vLLM's own code makes of adapters of experts in files, run by its Python: `python in_vllm.py < jobs.json`.

Its kernels for them need a GPU, its loaders do not. Of each job it writes the factors of w1, w2 and w3 that the kernels
would get: (E, r, in) and (E, out, r).
"""

import ast
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.models import ModelRegistry


def names_of(architecture: str) -> list[str]:
    """Return what vLLM calls gate, down and up of an expert, by its source; up is missing where there is no gate."""
    spec = find_spec(ModelRegistry.models[architecture].module_name)
    given: dict[str, ast.expr] = {}
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.Call):
            given |= {k.arg: k.value for k in node.keywords if k.arg and k.arg.startswith("ckpt_")}
    if "ckpt_names" in given:
        names = ast.literal_eval(given["ckpt_names"])
    else:
        kinds = ("gate", "down", "up")
        names = [ast.literal_eval(given.get(f"ckpt_{k}_proj_name", ast.Constant(f"{k}_proj"))) for k in kinds]
    return [name for name in names if name is not None]


def run(folder: str, block: str, layout: str, architecture: str, experts: int, out: str) -> None:
    """Load a folder, and pack the factors of one block."""
    names = names_of(architecture)
    parts = [f"{block}.{e}.{name}" for e in range(experts) for name in names]
    if layout == "vllm-shared":
        parts = [f"{block}.w{n}" for n in (1, 2, 3)[: len(names)]]
    last = block.rpartition(".")[2]
    expected = {"q_proj", "o_proj", "out_proj", last, *(f"{last}.{part.removeprefix(f'{block}.')}" for part in parts)}
    helper = PEFTHelper.from_local_dir(folder, None)
    held = LoRAModel.from_local_checkpoint(folder, expected, helper, lora_model_id=1, device="cpu", dtype=torch.float32)
    if layout == "vllm-3d":
        module = SimpleNamespace(
            w13_lora_a_stacked=[torch.zeros(1, experts)], global_num_experts=experts, ep_rank=0,
        )  # fmt: skip
        manager = SimpleNamespace(_get_lora_layer_weights=LoRAModel.get_lora, _is_3d_moe_model=True)
        LoRAModelManager._stack_moe_lora_weights(manager, held, module, block)
        of_block = held.loras[block]
        scalings = [held.loras[f"{block}.base_layer"].scaling, of_block.scaling]
    else:
        given = [held.get_lora(part) for part in parts]
        if layout == "vllm-shared":
            of_block = PackedLoRALayerWeights.pack_moe_stacked(given, block)
        else:
            if len(names) == 2:
                given = LoRAModelManager._pad_lora_pairs_to_triplets(given)
            of_block = PackedLoRALayerWeights.pack_moe(given, block, is_non_gated_moe=len(names) == 2)
        scalings = of_block.scaling
    factors = {}
    for n, (A, B, s) in enumerate(zip(of_block.lora_a, of_block.lora_b, scalings)):
        factors |= {f"{n}.A": A.contiguous().clone(), f"{n}.B": (B * s).contiguous()}
    save_file(factors, out)


if __name__ == "__main__":
    for job in json.load(sys.stdin):
        run(**job)
