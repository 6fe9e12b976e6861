# SPDX-License-Identifier: Apache-2.0
"""Adapter configurations and their JSON files."""

from graft.config.base import PeftConfig, TaskType

__all__ = ["PeftConfig", "TaskType"]
