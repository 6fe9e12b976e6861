# SPDX-License-Identifier: Apache-2.0
"""The README.md of a saved adapter: a model card for the hub. An existing card keeps its text."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from graft.config.atomic import replace_file
from graft.config.base import FORMAT_VERSION
from graft.config.reading import open_file
from graft.core.errors import escape_controls

if TYPE_CHECKING:
    from torch import nn

VERSIONS = "### Framework versions"
TEXT = """
# Adapter for {base}

A {kind} adapter (rank and targets: see adapter_config.json), saved by graft in the format of PEFT {version}.

```python
import graft
model = graft.{cls}.from_pretrained(base_model, "<this folder>")
```
"""


def write_card(model: nn.Module, folder: str) -> None:
    """Write or update `README.md` in `folder`: tags, base model, library name and the line with PEFT's version.

    An existing card keeps its text and gets missing parts. A link counts as no card and is replaced. If nothing
    changes, nothing is written.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = os.path.join(folder, "README.md")
    base = model.get_base_model()
    name = getattr(getattr(base, "config", None), "_name_or_path", None) or base.__dict__.get("name_or_path")
    name = escape_controls(str(name)) if name else None
    kind = model.peft_type.value
    before = None
    if os.path.isfile(path) and not os.path.islink(path):  # a link may lead to a private text
        with open_file(path) as f:
            before = f.read().decode("utf-8-sig")
        card = ModelCard(before)
    else:
        text = TEXT.format(
            base=name or type(base).__name__, kind=kind, version=FORMAT_VERSION, cls=type(model).__name__
        )
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n{text}")
    tags = set(card.data.get("tags") or []) | set(getattr(base, "model_tags", None) or [])
    if hasattr(base, "_checkpoint_conversion_mapping") or hasattr(type(base), "is_gradient_checkpointing"):
        tags.add("transformers")
    if kind == "LORA":
        tags.add("lora")
    if name:
        tags.add(f"base_model:adapter:{name}")
        card.data["base_model"] = name
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted(tags)
    if model.peft_config and next(iter(model.peft_config.values())).task_type == "CAUSAL_LM":
        card.data["pipeline_tag"] = "text-generation"
    line = f"- PEFT {FORMAT_VERSION}"
    if VERSIONS not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{VERSIONS}\n\n{line}\n"
    elif line not in card.text:
        card.text = card.text.replace(f"{VERSIONS}\n", f"{VERSIONS}\n\n{line}\n", 1)
    text = str(card)
    if text != before:
        os.makedirs(folder, exist_ok=True)
        replace_file(path, text)
