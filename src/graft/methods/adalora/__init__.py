# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: its config and maths, and the allocator that moves rank between layers."""
