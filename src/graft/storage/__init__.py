# SPDX-License-Identifier: Apache-2.0
"""The stores: how modules hold weights. Only files in this folder look inside a module for its weight."""

from graft.storage.codes import codes_in, hold_bias, holds_codes, loose_bias, numel, ready, release
from graft.storage.dense import Dense
from graft.storage.experts import experts_of, is_transposed, packed_shape, parameter_names
from graft.storage.find import (
    DENSE,
    FOREIGN,
    PACKED,
    STORES,
    TENSORS,
    find_store,
    find_tensor_store,
    innermost,
    of_tensor,
    place_of,
)
from graft.storage.foreign import ByIdentity
from graft.storage.quantized import Quantized
from graft.storage.shared_work import group_of, piece_of, refusal
from graft.storage.stacks import packed_names
from graft.storage.tensor_parallel import standalone

__all__ = [
    "DENSE",
    "FOREIGN",
    "PACKED",
    "STORES",
    "TENSORS",
    "ByIdentity",
    "Dense",
    "Quantized",
    "codes_in",
    "experts_of",
    "find_store",
    "find_tensor_store",
    "group_of",
    "hold_bias",
    "holds_codes",
    "innermost",
    "is_transposed",
    "loose_bias",
    "numel",
    "of_tensor",
    "packed_names",
    "packed_shape",
    "parameter_names",
    "piece_of",
    "place_of",
    "ready",
    "refusal",
    "release",
    "standalone",
]
