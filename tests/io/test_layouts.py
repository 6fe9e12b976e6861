# SPDX-License-Identifier: Apache-2.0
"""Files that hold the factors of stacks of experts in other layouts: those of old releases of PEFT, and Unsloth's."""

import json
from contextlib import nullcontext
from itertools import combinations, product

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import graft
from tests.covering import Case, law
from tests.families import SIZES
from tests.inject.test_parameters import MODELS, base, logits, on_stacks
from tests.io import old_peft
from tests.leaves_out import FUSED_EXPERTS
from tests.looks import layers

pytestmark = FUSED_EXPERTS
SQUARE = SIZES["hidden_size"]


def resized(name, width):
    """A model of which down_proj is square (width 16), or gate_up_proj (width 8), or none."""
    return base(name, **{"moe_intermediate_size" if name == "qwen" else "intermediate_size": width})


BOTH, UP, DOWN = ["experts.gate_up_proj", "experts.down_proj"], ["experts.gate_up_proj"], ["experts.down_proj"]
STACKS = {"both": BOTH, "up": UP, "down": DOWN}
WIDTHS = {"down-square": SQUARE, "up-square": SQUARE // 2, "none-square": SQUARE // 4}


def written(folder, name, targets, width, version, grouped=False, **fields):
    """Write the file that another release would have; return the logits that it had."""
    model = on_stacks(graft, None, model=resized(name, width), target_modules=[], target_parameters=targets)
    expected = logits(model)
    kept = {layer.site.key: layer for layer in layers(model).values()}
    model.save_pretrained(folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    for stem in {k.rpartition(".lora_")[0] for k in tensors}:
        inner = stem.endswith("base_layer") or targets == UP
        end = "gate_up_proj" if inner else "down_proj"
        op = next(layer.op for key, layer in kept.items() if key.endswith(end))
        a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        A, B = tensors[a].view(4, 2, -1), tensors[b].view(-1, 2, 4).permute(2, 0, 1)  # (4, r, in), (4, out, r)
        if exchanged(version, op.transposed):
            A, B = B.mT, A.mT
        tensors[a] = A.reshape(8, -1).contiguous()
        tensors[b] = (B.permute(1, 0, 2) if grouped else B.permute(1, 2, 0)).reshape(-1, 8).contiguous()
    save_file(tensors, weights)  # without graft's notes
    values = json.loads(config.read_text()) | {"peft_version": version} | fields
    config.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return expected


def exchanged(version, transposed):
    """Whether a release of PEFT took the axes of a stack otherwise than graft."""
    if version in (None, "0.17.1", "0.18.1"):
        return not transposed  # it took all as (n, in, out)
    return version == "0.19.0"


def load(folder, name, width, **options):
    return graft.PeftModel.from_pretrained(resized(name, width), folder, **options)


VERSIONS = ["0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.2"]


@pytest.mark.differs("files of PEFT before 0.19.1 with stacks of experts; Unsloth's")
@law(
    "kind, square, stacks, version",
    [Case(case) for case in product(MODELS, WIDTHS, STACKS, VERSIONS)],
    lambda case: [*combinations(enumerate(case), 2), ("layout", *case[1:])],
)
def test_files_of_old_releases(tmp_path, kind, square, stacks, version):
    """Shapes tell, or else the version; what is saved then is right for PEFT and for graft."""
    width, targets = WIDTHS[square], STACKS[stacks]
    expected = written(tmp_path / "old", kind, targets, width, version)
    model = load(tmp_path / "old", kind, width)
    assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new/adapter_config.json").read_text())["peft_version"] == "0.21.2"
    assert_close(logits(load(tmp_path / "new", kind, width)), expected)


def test_what_a_caller_says_counts(tmp_path):
    expected = written(tmp_path, "mixtral", DOWN, SQUARE, "0.18.1", peft_version="0.20.0")  # trained on by a later one
    assert not torch.allclose(logits(load(tmp_path, "mixtral", SQUARE)), expected, atol=1e-3)
    assert_close(logits(load(tmp_path, "mixtral", SQUARE, expert_layout="exchanged")), expected)
    model = load(tmp_path, "mixtral", SQUARE)
    model.load_adapter(tmp_path, "again", expert_layout=["exchanged", "rank_major"])
    model.set_adapter("again")
    assert_close(logits(model), expected)
    with pytest.raises(graft.ConfigError, match=r"expert_layout='swapped'.*'swapped' is none of peft, exchanged"):
        load(tmp_path, "mixtral", SQUARE, expert_layout="swapped")


@pytest.mark.parametrize("version", ["0.18.2.dev0", "0.19.1.dev0@abc", "main"])
def test_what_cannot_be_decided_is_said(tmp_path, version):
    written(tmp_path, "mixtral", DOWN, SQUARE, version)
    with pytest.warns(graft.PeftWarning, match="does not tell whether A and B.*expert_layout='exchanged'"):
        load(tmp_path, "mixtral", SQUARE)
    load(tmp_path, "mixtral", SQUARE, expert_layout="peft")


def test_a_config_without_a_version_is_old(tmp_path):
    expected = written(tmp_path, "mixtral", DOWN, SQUARE, None)
    with pytest.warns(graft.PeftWarning, match="does not tell whether A and B.*before 0.18 wrote them"):
        model = load(tmp_path, "mixtral", SQUARE)
    assert_close(logits(model), expected)


UNSLOTH = {"auto_mapping": {"base_model_class": "MixtralForCausalLM", "unsloth_fixed": True}}


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2"])
@pytest.mark.parametrize("targets", [BOTH, DOWN], ids=["both", "down"])
def test_files_of_unsloth(tmp_path, targets, version):
    """Columns of B by expert: noted since September 2026, else only the caller knows."""
    unmarked, marked = tmp_path / "unmarked", tmp_path / "marked"
    written(unmarked, "mixtral", targets, SQUARE, version, grouped=True, **UNSLOTH)
    expected = written(marked, "mixtral", targets, SQUARE, version, grouped=True, lora_B_layout="grouped_by_expert")
    assert_close(logits(load(marked, "mixtral", SQUARE)), expected)
    with pytest.warns(graft.PeftWarning, match="trained by Unsloth.*expert_layout='grouped_by_expert'"):
        wrong = load(unmarked, "mixtral", SQUARE)
    assert not torch.allclose(logits(wrong), expected, atol=1e-3)
    assert_close(logits(load(unmarked, "mixtral", SQUARE, expert_layout="grouped_by_expert")), expected)
    written(marked, "mixtral", targets, SQUARE, version, lora_B_layout="rank_major", **UNSLOTH)
    assert_close(logits(load(marked, "mixtral", SQUARE)), expected)


@pytest.mark.parametrize("release", sorted(folder.name for folder in old_peft.FOLDER.iterdir()))
@pytest.mark.parametrize("kind", old_peft.KINDS)
def test_files_that_old_releases_wrote(kind, release):
    """Square stacks, which shapes do not tell apart; 0.17 did not note its version."""
    folder = old_peft.FOLDER / release
    said = release == "0.17.1" and kind != "transposed"
    with pytest.warns(graft.PeftWarning, match="does not tell whether A and B") if said else nullcontext():
        model = graft.PeftModel.from_pretrained(old_peft.Model(kind), folder / kind)
    expected = load_file(folder / "outputs.safetensors")[kind]
    assert_close(model(old_peft.INPUT), expected)
    assert not torch.allclose(old_peft.Model(kind)(old_peft.INPUT), expected, atol=1e-3)
