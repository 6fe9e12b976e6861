# SPDX-License-Identifier: Apache-2.0
"""Pure functions on tensors, each with what it computes in its docstring."""
