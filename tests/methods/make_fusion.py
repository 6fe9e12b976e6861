# SPDX-License-Identifier: Apache-2.0
"""Make `fixtures/fusion`: AdapterFusion of AdapterHub's library on two of the models of `fixtures/adapterhub`.

`make test-oracles` makes them anew. Each folder has
two bottlenecks and the fusion as the library saves them, and `outputs.safetensors` what it computes with them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.methods.make_adapterhub import fill

HERE = Path(__file__).parent / "fixtures"


def cases():
    import adapters as a

    same = dict(reduction_factor=2)
    return {
        "bert-pfeiffer": (a.SeqBnConfig(**same), a.DynamicAdapterFusionConfig()),
        "bert-gated": (a.DoubleSeqBnConfig(use_gating=True, leave_out=[1], **same), a.StaticAdapterFusionConfig()),
        "llama-pfeiffer": (a.SeqBnConfig(**same), a.DynamicAdapterFusionConfig(value_before_softmax=False)),
        "llama-plus": (a.AdapterPlusConfig(stochastic_depth=0.0, **same), a.DynamicAdapterFusionConfig()),
    }


def main(out: Path) -> None:
    import adapters
    import transformers

    assert adapters.__version__ == "1.3.0", adapters.__version__
    for label, (bottleneck, fusion) in cases().items():
        base = HERE / "adapterhub" / label.partition("-")[0]
        model = transformers.AutoModel.from_pretrained(base, attn_implementation="eager")
        given = {k[3:]: v for k, v in load_file(base / "outputs.safetensors").items() if k.startswith("in.")}
        model.config._name_or_path = base.name
        adapters.init(model)
        for name in ("a", "b"):
            model.add_adapter(name, config=bottleneck)
        model.add_adapter_fusion(["a", "b"], fusion)
        own = ("adapters.a.", "adapters.b.", "adapter_fusion_layer.")
        fill({k: p for k, p in model.named_parameters() if any(o in k for o in own)}, 3)
        model.active_adapters = adapters.composition.Fuse("a", "b")
        model.eval()
        with torch.no_grad():
            y = model(**given).last_hidden_state
        folder = out / "fusion" / label
        folder.mkdir(parents=True)
        for name in ("a", "b"):
            model.save_adapter(str(folder / name), name, with_head=False)
        model.save_adapter_fusion(str(folder / "fused"), ["a", "b"])
        loss = model.get_fusion_regularization_loss()
        save_file(
            {"y": y.contiguous(), "loss": torch.tensor(0.0) if loss is None else loss.detach()},
            folder / "outputs.safetensors",
        )
