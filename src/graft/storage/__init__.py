# SPDX-License-Identifier: Apache-2.0
"""The stores: how modules hold weights. Only files in this folder read the tensors of a module.

A store is found by the module's type or by the type of its weight. Without a row in the tables, a weight is dense under
two conditions: it is a plain tensor or DTensor of 16 to 64 bits per float, and its module runs the forward of its row
in the table of ops. Subclasses that only hook or patch instances are dense. Any other weight is foreign
(`storage/foreign.py`). Packages that mark torch's own layers as theirs are recognised by the attribute that they set. A
layer type with the forward of its base gets a row by `OPS.add("package.module.MyLinear", OPS.find(nn.Linear))`. A file
of this folder names the classes that it knows by qualified name, and imports their package only when it meets one.
"""

from graft.storage.codes import (
    count_numbers,
    has_loose_bias,
    holds_codes,
    make_bias_parameter,
    prepare_packed,
    release_packed,
    why_copy_cannot_train,
)
from graft.storage.dense import Dense
from graft.storage.experts import ExpertBlock
from graft.storage.find import (
    DENSE,
    FOREIGN,
    PACKED,
    STORES,
    TENSORS,
    find_device_and_dtype,
    find_store,
    find_store_of_tensor,
    find_tensor_store,
    innermost,
)
from graft.storage.foreign import ByIdentity
from graft.storage.fsdp2 import Sharding, find_compute_dtype, find_sharding, gather_module, standalone
from graft.storage.quantized import Quantized
from graft.storage.shared_work import find_group, find_piece, why_no_adapter

__all__ = [
    "DENSE",
    "FOREIGN",
    "PACKED",
    "STORES",
    "TENSORS",
    "ByIdentity",
    "Dense",
    "ExpertBlock",
    "Quantized",
    "Sharding",
    "count_numbers",
    "find_compute_dtype",
    "find_device_and_dtype",
    "find_group",
    "find_piece",
    "find_sharding",
    "find_store",
    "find_store_of_tensor",
    "find_tensor_store",
    "gather_module",
    "has_loose_bias",
    "holds_codes",
    "innermost",
    "make_bias_parameter",
    "prepare_packed",
    "release_packed",
    "standalone",
    "why_copy_cannot_train",
    "why_no_adapter",
]
