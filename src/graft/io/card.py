# SPDX-License-Identifier: Apache-2.0
"""The README.md of a saved adapter: a model card for the hub. An existing card keeps its text."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING

from graft.config.atomic import replace_file
from graft.config.pair import FORMAT_VERSION
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
    changes, nothing is written. The folder is made if needed. "transformers" is a tag for its models, and the base's
    `model_tags` are tags. The first adapter's task CAUSAL_LM sets the pipeline tag. The base's name is `_name_or_path`
    of its config, else its `name_or_path`.
    """
    path = os.path.join(folder, "README.md")
    base = model.get_base_model()
    name = getattr(getattr(base, "config", None), "_name_or_path", None) or base.__dict__.get("name_or_path")
    before = None
    if os.path.isfile(path) and not os.path.islink(path):  # a link may lead to a private text
        with open_file(path) as f:
            before = f.read().decode("utf-8-sig")
    tags = set(getattr(base, "model_tags", None) or [])
    if hasattr(base, "_checkpoint_conversion_mapping") or hasattr(type(base), "is_gradient_checkpointing"):
        tags.add("transformers")
    causal = bool(model.peft_config) and next(iter(model.peft_config.values())).task_type == "CAUSAL_LM"
    base_name = escape_controls(str(name)) if name else None
    adapter = model.peft_type.value, type(model).__name__
    text = compose_card(before, base_name, type(base).__name__, *adapter, frozenset(tags), causal)
    if text != before:
        os.makedirs(folder, exist_ok=True)
        replace_file(path, text)


@lru_cache(maxsize=16)  # a training saves the same card again and again
def compose_card(
    before: str | None, name: str | None, base_class: str, kind: str, cls: str, tags: frozenset[str], causal: bool
) -> str:
    """Return the text of a card. Cached by its arguments.

    The library name becomes "peft"; tags are sorted. LORA adds the tag "lora"; a `name` adds the tag
    "base_model:adapter:<name>" and sets `base_model`. The line with PEFT's version is added to its section, which is
    made if needed, unless it is there.

    Args:
        before: the card to update; None: a new one.
        name: of the base model, if it has one; base_class: its class.
        kind: peft_type; cls: class of the model with the adapter.
        tags: to be added to those of `before`.
        causal: set the pipeline tag "text-generation".
    """
    from huggingface_hub import ModelCard, ModelCardData

    if before is not None:
        card = ModelCard(before)
    else:
        text = TEXT.format(base=name or base_class, kind=kind, version=FORMAT_VERSION, cls=cls)
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n{text}")
    all_tags = {*(card.data.get("tags") or []), *tags}
    if kind == "LORA":
        all_tags.add("lora")
    if name:
        all_tags.add(f"base_model:adapter:{name}")
        card.data["base_model"] = name
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted(all_tags)
    if causal:
        card.data["pipeline_tag"] = "text-generation"
    line = f"- PEFT {FORMAT_VERSION}"
    if VERSIONS not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{VERSIONS}\n\n{line}\n"
    elif line not in card.text:
        card.text = card.text.replace(f"{VERSIONS}\n", f"{VERSIONS}\n\n{line}\n", 1)
    return str(card)
