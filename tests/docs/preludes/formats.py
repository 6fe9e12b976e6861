# SPDX-License-Identifier: Apache-2.0
"""A Llama, and adapters for it that torchtune and mlx-lm wrote."""

import shutil
from pathlib import Path

from tests.files.test_load import FIXTURES, llama

base = llama().eval().requires_grad_(False)
for there, here in (("torchtune_dora", "torchtune/epoch_0"), ("mlx_lora", "mlx/adapters")):
    shutil.copytree(Path(FIXTURES) / there, here)
