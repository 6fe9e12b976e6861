# SPDX-License-Identifier: Apache-2.0
"""The outputs of a merged folder against those of the base with its adapters, both loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import kl_div

from graft.config.atomic import replace, write_text
from graft.config.reading import Json
from graft.core.errors import ConfigError
from graft.files.errors import OptionError
from graft.files.formats import peft, recognise
from graft.files.merging.merge import CERTIFICATE
from graft.model.foreign import load_adapter
from graft.model.peft_model import PeftModel

LENGTH = 32  # tokens of a prompt
SEED = 0


def check_probe(adapters: Sequence[object], weights: Sequence[float] | None = None) -> None:
    """Raise OptionError for several adapters or weights, which no model has unmerged in this way."""
    if len(adapters) != 1 or (weights is not None and list(weights) != [1.0]):
        raise OptionError("--probe compares one adapter of weight 1: there is no unmerged model for others.")


@torch.no_grad()
def probed(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    merged: str | os.PathLike[str],
    prompts: int,
    weights: Sequence[float] | None = None,
) -> Json:
    """Compare logits on prompts of random tokens, always the same; write the result into merge.json, if that is there.

    Both models are in memory, in float32.

    Returns:
        prompts, tokens; largest_difference: of a logit; kl: KL(with adapters ‖ merged) per token, in nats.

    Raises:
        OptionError: see `check_probe`.
        ConfigError: the model gives no logits.
    """
    check_probe(adapters, weights)
    with open(os.path.join(merged, "config.json"), encoding="utf-8") as f:
        names = json.load(f).get("architectures") or []
    one, two = model_of(base, names), model_of(merged, names)
    sizes = [m.get_input_embeddings().weight.shape[0] for m in (one, two)]
    if sizes[0] != sizes[1]:  # the adapter brings the rows along
        one.resize_token_embeddings(sizes[1], mean_resizing=False)
    load = PeftModel.from_pretrained if recognise(os.fspath(adapters[0])) == peft.NAME else load_adapter
    one = load(one, adapters[0]).eval()
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = min(m.get_input_embeddings().weight.shape[0] for m in (one, two))
    ids = torch.randint(vocabulary, (prompts, LENGTH), generator=generator)
    largest = kl = 0.0
    for row in ids:
        a, b = (getattr(m(input_ids=row[None]), "logits", None) for m in (one, two))
        if a is None or b is None:
            raise ConfigError(f"{type(two).__name__} gives no logits to compare.")
        largest = max(largest, float((a - b).abs().max()))
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        kl += float(kl_div(q, p, log_target=True, reduction="sum")) / p[..., 0].numel()
    found = {"prompts": prompts, "tokens": ids.numel(), "largest_difference": largest, "kl": kl / prompts}
    path = os.path.join(merged, CERTIFICATE)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            report = json.load(f)
        replace(path, write_text(json.dumps(report | {"probe": found}, indent=1) + "\n"))
    return found


def model_of(path: str | os.PathLike[str], names: Sequence[str]) -> nn.Module:
    import transformers

    kind = next((k for n in names if (k := getattr(transformers, n, None)) is not None), transformers.AutoModel)
    model: nn.Module = kind.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    return model.eval()
