# SPDX-License-Identifier: Apache-2.0
"""Triton forms of the functions in the modules of the same names one level up. Written and tested in Triton's
interpreter and compiled for GPUs, not measured on one yet."""
