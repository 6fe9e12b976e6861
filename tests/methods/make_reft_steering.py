# SPDX-License-Identifier: Apache-2.0
"""Make `fixtures/pyreft` and `fixtures/repeng`: what these libraries compute on the Llama of `fixtures/adapterhub`.

`make test-oracles` makes them anew. Of pyreft: each kind of intervention at some tokens of each block, its tensors and
the model's output; and two folders as it saves them, with the outputs of what is in them. Of repeng: a control vector
as it exports it, the model's outputs with it, and directions that it finds from pairs of texts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "fixtures"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
AT = [0, 1, 5]  # of six tokens
KINDS = dict(
    loreft=("LoreftIntervention", {}),
    noreft=("NoreftIntervention", dict(add_bias=False)),
    nodireft=("NodireftIntervention", dict(add_bias=False, act_fn="gelu")),
    direft=("DireftIntervention", {}),  # whose R stays orthonormal, which the paper's is not
)


def base():
    import transformers

    return transformers.AutoModel.from_pretrained(HERE / "adapterhub" / "llama", attn_implementation="eager").eval()


def of_pyreft(out: Path) -> None:
    import pyreft

    (out / "pyreft").mkdir(exist_ok=True)
    for kind, (name, options) in KINDS.items():
        torch.manual_seed(5)
        model = base()
        made = [
            getattr(pyreft.interventions, name)(embed_dim=8, low_rank_dimension=2, dtype=torch.float32, **options)
            for _ in range(2)
        ]
        reft = pyreft.get_reft_model(
            model,
            pyreft.ReftConfig(
                representations=[
                    dict(layer=i, component="block_output", low_rank_dimension=2, intervention=own)
                    for i, own in enumerate(made)
                ]
            ),
            set_device=False,
        )
        tensors = {}
        for i, own in enumerate(made):
            with torch.no_grad():
                own.learned_source.weight.normal_()
                own.learned_source.bias.normal_()
            R = own.rotate_layer.weight.T if hasattr(own, "rotate_layer") else own.proj_layer.weight
            tensors |= {f"{i}.R": R, f"{i}.A.weight": own.learned_source.weight, f"{i}.A.bias": own.learned_source.bias}
        places = {"sources->base": (None, [[AT] * len(IDS)] * 2)}
        with torch.no_grad():
            tensors["y"] = reft({"input_ids": IDS}, unit_locations=places)[1].last_hidden_state
        held = {key: t.detach().clone().contiguous() for key, t in tensors.items()}
        save_file(held, out / "pyreft" / f"{kind}.safetensors")
    saved(out / "pyreft")


SAVED = {  # folder → class, blocks of its interventions, and at which tokens each acts
    "loreft": ("LoreftIntervention", [0, 1, 0, 1], [[0, 1]] * 2 + [[5]] * 2),
    "direft": ("DireftIntervention", [1], [[0, 1, 2]]),
}


def saved(folder: Path) -> None:
    """Have pyreft save interventions after blocks, and compute with them."""
    import pyreft

    for name, (kind, blocks, at) in SAVED.items():
        torch.manual_seed(6)
        made = [
            getattr(pyreft.interventions, kind)(embed_dim=8, low_rank_dimension=2, dtype=torch.float32) for _ in blocks
        ]
        for own in made:
            with torch.no_grad():
                own.learned_source.weight.normal_()
                own.learned_source.bias.normal_()
        places = [
            dict(layer=i, component="block_output", low_rank_dimension=2, intervention=own)
            for i, own in zip(blocks, made)
        ]
        reft = pyreft.get_reft_model(base(), pyreft.ReftConfig(representations=places), set_device=False)
        locations = {"sources->base": (None, [[tokens] * len(IDS) for tokens in at])}
        with torch.no_grad():
            y = reft({"input_ids": IDS}, unit_locations=locations)[1].last_hidden_state
        reft.save(str(folder / name))
        save_file({"y": y.contiguous()}, folder / name / "outputs.safetensors")


class Letters:
    """A tokenizer of letters."""

    def __call__(self, texts, **_):
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        for row, text in zip(ids, texts):
            row[: len(text)] = torch.tensor([ord(c) - 96 for c in text])
        held = dict(input_ids=ids, attention_mask=(ids > 0).long())

        class Batch(dict):
            def to(self, _device):
                return self

        return Batch(held)


PAIRS = [("abc", "bca"), ("dead", "fade"), ("cafe", "face"), ("bead", "deaf"), ("gag", "egg")]


def of_repeng(out: Path) -> None:
    import repeng

    (out / "repeng").mkdir(exist_ok=True)
    rng = np.random.default_rng(5)
    vector = repeng.ControlVector("llama", {1: rng.normal(size=8).astype("f4")})
    vector.export_gguf(out / "repeng" / "vector.gguf")
    held = {"direction.1": torch.from_numpy(vector.directions[1])}
    for label, options in dict(plain={}, normalized=dict(normalize=True)).items():
        model = Around(base())
        controlled = repeng.ControlModel(model, [1])
        controlled.set_control(vector, 1.5, **options)
        with torch.no_grad():  # it wants one row at a time, with positions
            rows = [model(ids[None], position_ids=torch.arange(6)[None]).last_hidden_state for ids in IDS]
        held[label] = torch.cat(rows)
    entries = [repeng.DatasetEntry(*pair) for pair in PAIRS]
    found = repeng.ControlVector.train(Around(base()), Letters(), entries, hidden_layers=[0], method="pca_diff")
    held["found.0"] = torch.from_numpy(found.directions[0])
    save_file({key: t.contiguous().clone() for key, t in held.items()}, out / "repeng" / "outputs.safetensors")


class Around(torch.nn.Module):
    """The model with its layers where repeng looks for them."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)
