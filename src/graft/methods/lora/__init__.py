# SPDX-License-Identifier: Apache-2.0
"""LoRA: its config, its maths, its initialisations."""
