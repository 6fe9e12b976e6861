# SPDX-License-Identifier: Apache-2.0
"""Tests that an older release of a package cannot pass, and why: `make test-oldest` leaves them out."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def not_under(package: str, last: str, why: str) -> pytest.MarkDecorator:
    """Leave a test out under this release of a package (2.6 stands for all of 2.6) and those before it."""
    wanted = tuple(map(int, last.split(".")))
    there = Version(version(package)).release[: len(wanted)]
    return pytest.mark.skipif(there <= wanted, reason=f"{package} {last}: {why}")


FUSED_EXPERTS = not_under("transformers", "4", "experts of Mixtral and Qwen are modules, not one stack of weights")
WHOLE_GRAPHS = not_under("torch", "2.6", "its compiler breaks graphs at graft's context managers")
FSDP2_ON_CPUS = not_under("torch", "2.6", "FSDP2 asks a CPU for events, and all parameters for one dtype")
CONVERSIONS = not_under(
    "transformers", "4", "PEFT's module imports transformers' table of conversions, which is not there"
)
DEEP_DECODERS = not_under("transformers", "4", "a cache of Bart has as many layers as its encoder")
EMPTY_FILES = not_under("safetensors", "0.4", "it reads no file without tensors")
CACHES_OF_LLAMA4 = not_under("transformers", "4", "Llama 4 alone says other things with its cache than without")
CHUNKS_OF_PADDED = not_under("transformers", "4", "a prompt in chunks has positions that count its padding")
KERNELS_ON_CPUS = not_under("transformers", "4", "Mamba's mixers hand weights to their kernel on CUDA devices alone")
STATES_OF_MAMBA = not_under("transformers", "4", "Mamba's state is no cache, and after one token says other things")
EMBEDDINGS_APART = not_under("transformers", "4", "a T5 has one module for both of its embeddings")
LATER_EPOCHS = not_under("transformers", "4", "Trainer takes other batches where it resumes within a later epoch")
FP8_ON_CPUS = not_under("transformers", "4", "it loads weights in FP8 where there is a GPU alone, dequantized, too")
PLANS = not_under("transformers", "4", "its models ask for autocast on the meta device, where torch has none")
OWN_CACHES = not_under("transformers", "4", "a model makes itself a cache that tells of no states")
MASKS_WITHOUT_CACHES = not_under("transformers", "4", "a call without a cache has a mask, and other last bits")
ADDRESSES_OF_EXPERTS = not_under("transformers", "5.23", "grouped products ask for the address of a stack's weight")
OPEN_SETTINGS = not_under("transformers", "4", "a GenerationConfig has a default for what it leaves open")
