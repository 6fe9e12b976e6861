# SPDX-License-Identifier: Apache-2.0
"""gptqmodel: layers of GPTQ and AWQ codes."""

import peft
import pytest
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from torch import nn
from torch.testing import assert_close

import graft
from tests.models import disturb
from tests.packages.llama import model_tests, plain
from tests.storage.cells import IN, Kind, Net, cells, linear
from tests.storage.standins import BITS, GROUP, AwqBits, GptqBits


def packed(kind, standin, layer, **settings):
    """A layer of the package with the tensors of a stand-in."""
    sizes = dict(in_features=layer.in_features, out_features=layer.out_features, bias=layer.bias is not None)
    made = kind(bits=BITS, group_size=GROUP, sym=False, register_buffers=True, **sizes, **settings)
    for name, t in standin(layer, torch.float16).named_buffers():
        made.get_buffer(name).copy_(t)
    made.post_init()
    return made.eval()


def gptq(layer):
    return packed(TorchLinear, GptqBits, layer, desc_act=True)


def awq(layer):
    return packed(AwqTorchLinear, AwqBits, layer, desc_act=False)


FEW = ("LORA", "LORA-dora", "LOHA", "OFT", "HIRA", "IA3", "BEFT", "RANDLORA", "FOURIERFT")
CODES = "codes that were calibrated, and merging would quantize them anew"
KINDS = [
    Kind("gptq", gptq, 2e-2, f"GPTQ {CODES}", dtype=torch.float16, only=FEW),
    Kind("awq", awq, 2e-2, f"AWQ {CODES}", dtype=torch.float16, only=FEW),
]
globals().update(cells(KINDS))


def llama(pack):
    def make(folder):
        model = plain(folder)
        for name, m in list(model.model.named_modules()):
            if isinstance(m, nn.Linear):
                model.model.set_submodule(name, pack(m))
        return model

    return make


# without those that merge into packed weights
(
    folder,
    kind,
    base,
    test_all_linear_layers_train_as_over_the_dense_weights,
    test_what_stands_beside_the_packed_layers_trains,
    test_saving_and_loading,
    test_a_file_loads_over_the_dense_base,
    test_mixed_batches,
    _,
    _,
    test_outputs_are_those_of_peft,
) = model_tests({"gptq": llama(gptq), "awq": llama(awq)}, rounding=("awq",))  # whose products are in float16

CONFIGS = {
    "LORA": dict(r=4),
    "QA-LoRA": dict(r=4, use_qalora=True, qalora_group_size=GROUP),
    "OFT": dict(oft_block_size=8),
    "VERA": dict(r=4),
    "MISS": dict(r=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_computes_the_same(name):
    method = "LORA" if name == "QA-LoRA" else name
    options = CONFIGS[name] | dict(target_modules=["layer"])
    ours = graft.get_peft_model(Net(gptq(linear())), graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](**options))
    disturb(ours.eval())
    base = Net(gptq(linear()))
    base.quantization_method, base.hf_device_map = "gptq", {"": "cpu"}
    theirs = peft.get_peft_model(base, peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](**options)).eval()
    done = peft.set_peft_model_state_dict(theirs, graft.get_peft_model_state_dict(ours))
    assert not done.unexpected_keys
    x = torch.linspace(-1, 1, 3 * IN).view(3, IN).half()
    with pytest.raises(ValueError if method in ("LORA", "OFT") else TypeError) as words:
        theirs.merge_adapter()
    with pytest.raises(NotImplementedError, match=str(words.value) if method == "LORA" else "dequantize=True"):
        ours.merge_adapter()
    grads = []
    for model in (ours, theirs):
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        y.float().square().sum().backward()
        grads.append((y, inputs.grad))
    assert_close(*grads, rtol=1e-2, atol=1e-2)
