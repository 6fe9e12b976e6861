# SPDX-License-Identifier: Apache-2.0
"""Lower floor: pure functions on tensors, each with a plain reference, here or in tests/kernels/references.py.

LoRA keeps x, A, B and x Aᵀ for the backward pass, and dropout is computed again from a seed. DoRA's norm comes from
‖W‖², W Aᵀ and the Gram matrix of A. HRA reflects by the compact WY form. LoHa of small rank is a low-rank update of
rank r². HiRA computes its update again for the backward pass. VeLoRA's A is a factor with a separate backward pass,
which keeps projections of x: gᵀ (c ⊗ v) = (gᵀ c) ⊗ v. Measurements are in benchmarks/NOTES.md.
"""
