# SPDX-License-Identifier: Apache-2.0
"""Kernels: pure functions on tensors, each beside a plain reference."""
