# SPDX-License-Identifier: Apache-2.0
"""Prompts that are learned: a method, a file; and where they enter a model."""
