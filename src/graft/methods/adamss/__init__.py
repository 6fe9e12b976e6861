# SPDX-License-Identifier: Apache-2.0
"""AdaMSS: its config and maths, and the allocator that chooses the subspaces that train."""

from graft.methods.adamss.adamss import AdaMSS
from graft.methods.adamss.config import AdamssConfig

__all__ = ["AdaMSS", "AdamssConfig"]
