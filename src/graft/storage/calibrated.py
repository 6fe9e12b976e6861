# SPDX-License-Identifier: Apache-2.0
"""The stores of layers that only their kernels can read, most of them with calibrated codes.

GPTQ and AWQ are among them: only the kernel knows how it has repacked, rotated or permuted the codes.
"""

from __future__ import annotations

from torch import nn

from graft.core.ops import UNKNOWN, Linear, Op
from graft.storage.foreign import ByIdentity


class Sized(Linear):
    """A linear layer that has its sizes in attributes of other names than `out_features` and `in_features`.

    Args:
        out_features, in_features: names of the module's attributes.
    """

    def __init__(self, out_features: str, in_features: str):
        """Keep the names of the two attributes."""
        self.out_features, self.in_features = out_features, in_features

    def dims(self, m: nn.Module) -> tuple[int, int]:
        """Return the numbers of outputs and inputs, from the two attributes of the module."""
        return getattr(m, self.out_features), getattr(m, self.in_features)


class Eetq(Linear):
    """EETQ's layer, which has its weight as (in, out)."""

    def dims(self, m: nn.Module) -> tuple[int, int]:
        """Return (out_features, in_features), from the weight's shape (in, out)."""
        in_features, out_features = m.weight.shape
        return out_features, in_features


class Gptq(ByIdentity):
    """The store of GPTQ's layers: read by running the layer, never written."""

    def __init__(self) -> None:
        """Name the store "gptq" and its codes "GPTQ codes", which were calibrated."""
        super().__init__("gptq", "GPTQ codes")

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return the reason of the base class, and for `weight` PEFT's "(Cannot merge LORA layers when the model is
        gptq quantized)" after it.

        Another tensor gets the base class's answer alone, which may be None.
        """
        why = super().why_unwritable(m, name)
        if name != "weight":
            return why
        return f"{why} (Cannot merge LORA layers when the model is gptq quantized)"  # PEFT's words


GPTQ, AWQ = Gptq(), ByIdentity("awq", "AWQ codes")
GPTQMODEL = "gptqmodel.nn_modules.qlinear"
OLD_GPTQ = (
    "bitblas", "cuda", "cuda_old", "exllama", "exllamav2", "hpu", "ipex", "marlin", "qigen", "triton", "tritonv2",
)  # fmt: skip
AUTO_ROUND = (
    "torch.qlinear_torch", "torch.qlinear_torch_zp", "triton.qlinear_tritonv2", "triton.qlinear_tritonv2_zp",
    "cuda.qlinear_exllamav2", "hpu.qlinear_hpu", "ipex.qlinear_ipex_gptq",
)  # fmt: skip
QUANT_LINEARS = [
    *[f"auto_gptq.nn_modules.qlinear.qlinear_{kernel}.QuantLinear" for kernel in OLD_GPTQ],
    *[f"auto_round_extension.{module}.QuantLinear" for module in AUTO_ROUND],
]
AUTO_AWQ = (
    "gemm.WQLinear_GEMM", "gemv.WQLinear_GEMV", "gemv_fast.WQLinear_GEMVFast", "marlin.WQLinear_Marlin",
    "exllama.WQLinear_Exllama", "exllamav2.WQLinear_ExllamaV2", "gemm_ipex.WQLinear_IPEX",
)  # fmt: skip
EETQ = ByIdentity("eetq", "EETQ codes", calibrated=False)

MODULES = {
    f"{GPTQMODEL}.BaseQuantLinear": GPTQ,
    f"{GPTQMODEL}.AWQuantLinear": AWQ,
    f"{GPTQMODEL}.torch.TorchQuantEmbeddings": GPTQ,
    f"{GPTQMODEL}.paroquant.ParoLinear": ByIdentity("paroquant", "ParoQuant codes"),
    f"{GPTQMODEL}.WeightOnlyQuantLinear": ByIdentity("gptqmodel", "codes of gptqmodel", calibrated=False),
    **dict.fromkeys(QUANT_LINEARS, GPTQ),
    **{f"awq.modules.linear.{name}": AWQ for name in AUTO_AWQ},
    "transformers.integrations.eetq.EetqLinear": EETQ,
    "eetq.modules.qlinear.EetqLinear": EETQ,
    "transformers.integrations.higgs.HiggsLinear": ByIdentity("higgs", "HIGGS codes"),
    "transformers.integrations.nvfp4.NVFP4Linear": ByIdentity("nvfp4", "NVFP4 codes", calibrated=False),
    "transformers.integrations.metal_quantization.MetalLinear": ByIdentity("metal", "Metal codes", calibrated=False),
    "transformers.integrations.gguf.utils.GgufLinear": ByIdentity("gguf", "GGUF blocks", calibrated=False),
    "vptq.layers.vqlinear.VQuantLinear": ByIdentity("vptq", "VPTQ codes"),
    "spqr_quant.inference.QuantizedLinear": ByIdentity("spqr", "SpQR codes"),
    "fp_quant.module.linear.FPQuantLinear": ByIdentity("fp_quant", "FP-Quant codes", calibrated=False),
    "sinq.sinqlinear_hf.SINQLinear": ByIdentity("sinq", "SINQ codes", calibrated=False),
    "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules.PatchedLinear": ByIdentity(
        "inc", "float8 numbers of Intel Neural Compressor"
    ),
}
OPS: dict[str, Op] = {  # of rows that are not `Linear()`
    f"{GPTQMODEL}.torch.TorchQuantEmbeddings": UNKNOWN,  # derived from a linear layer, and takes ids
    **dict.fromkeys(QUANT_LINEARS, Sized("outfeatures", "infeatures")),
    "transformers.integrations.eetq.EetqLinear": Eetq(),
    "eetq.modules.qlinear.EetqLinear": Eetq(),
    "spqr_quant.inference.QuantizedLinear": Sized("m", "n"),
}
