# SPDX-License-Identifier: Apache-2.0
"""Prompt methods, a file each, and the hooks by which prompts enter a model."""
