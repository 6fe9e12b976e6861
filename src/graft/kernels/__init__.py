# SPDX-License-Identifier: Apache-2.0
"""Lower floor: pure functions on tensors, each with a plain reference, here or in tests/kernels/references.py."""
