# SPDX-License-Identifier: Apache-2.0
"""Folders of the base and of adapters, once for all servers."""

from __future__ import annotations

import pytest

import graft
from tests.files import adapters
from tests.servers.common import OPTIONS, model, words


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of the base, with a tokenizer, which vLLM wants."""
    path = tmp_path_factory.mktemp("base")
    model().save_pretrained(path)
    words(512).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp("adapter"))
            config = graft.LoraConfig(**dict(r=4, lora_alpha=8, target_modules=adapters.LISTED) | OPTIONS[name])
            adapters.quietly(adapters.quietly(adapters.moved, model(), config).save_pretrained, made[name])
        return made[name]

    return of
