# SPDX-License-Identifier: Apache-2.0
"""PEFT's mappings by peft_type, as views of the table of methods. Reading a value imports the method's file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from graft.methods import ROWS, PeftType, config_of, method_of
from graft.model.tuner import tuner_of


class _View(Mapping[Any, Any]):
    def __init__(self, of: Callable[[str], Any]):
        self._of = of

    def __getitem__(self, peft_type: Any) -> Any:
        if getattr(peft_type, "value", peft_type) not in ROWS:
            raise KeyError(peft_type)
        return self._of(peft_type)

    def __iter__(self) -> Iterator[Any]:
        return iter(PeftType)

    def __len__(self) -> int:
        return len(ROWS)


PEFT_TYPE_TO_CONFIG_MAPPING = _View(config_of)
PEFT_TYPE_TO_TUNER_MAPPING = _View(tuner_of)
PEFT_TYPE_TO_PREFIX_MAPPING = _View(lambda peft_type: method_of(peft_type).prefix)
