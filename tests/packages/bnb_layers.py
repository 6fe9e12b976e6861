# SPDX-License-Identifier: Apache-2.0
"""Layers of bitsandbytes with the values of plain ones."""

import bitsandbytes as bnb
import torch
from torch import nn


def four(layer, kind="nf4", nested=False, compute=None, storage=torch.uint8, blocksize=64):
    m = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute, nested, kind, quant_storage=storage
    )
    options = dict(compress_statistics=nested, quant_type=kind, quant_storage=storage, blocksize=blocksize, module=m)
    m.weight = bnb.nn.Params4bit(layer.weight.data.clone(), False, **options)
    m.bias = layer.bias
    return m.to("cpu")


def eight(layer, threshold=6.0, trains=False, floats=False):
    m = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, floats, threshold)
    m.weight = bnb.nn.Int8Params(layer.weight.data.clone(), False, floats)
    m.bias = layer.bias
    m = m.to("cpu")
    if trains:  # it then computes with the dequantized weight, and does not round its inputs
        m.train = lambda mode=True: m
    return m


def rearranged(m, saved=False):
    """The layer as a forward pass in eval mode leaves it on a CPU with AVX512-BF16; and then `state_dict()`."""
    m.weight.data, m.quant_state = bnb.functional._convert_weight_packed_for_cpu(m.weight.data, m.weight.quant_state)
    m.weight.quant_state = m.quant_state
    if saved:
        m.state_dict()
    return m


def embedding(kind, table, padding_idx=None):
    """An embedding of bitsandbytes with the values of a plain one; kind: 4 or 8 bits."""
    made = {4: bnb.nn.EmbeddingNF4, 8: bnb.nn.Embedding8bit}[kind](table.num_embeddings, table.embedding_dim)
    made.load_state_dict(table.state_dict())
    return made.to("cpu")


def pair(hold, sizes=(64, 128)):
    """A model of two such layers, in eval mode."""
    a, b = sizes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(hold(nn.Linear(a, b)), nn.Tanh(), hold(nn.Linear(b, a))).requires_grad_(False).eval()
