# SPDX-License-Identifier: Apache-2.0
"""The command `graft VERB`: a thin layer over `graft.files`, a file for each verb."""

from __future__ import annotations

from graft.command.app import main

__all__ = ["main"]
