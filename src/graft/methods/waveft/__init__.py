# SPDX-License-Identifier: Apache-2.0
"""WaveFT: its config and maths, and filters of wavelets."""

from graft.methods.waveft.config import WaveFTConfig
from graft.methods.waveft.waveft import WaveFT

__all__ = ["WaveFT", "WaveFTConfig"]
