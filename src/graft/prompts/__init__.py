# SPDX-License-Identifier: Apache-2.0
"""Prompt methods, a file each, and the hooks that put prompts into a model."""
