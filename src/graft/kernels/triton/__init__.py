# SPDX-License-Identifier: Apache-2.0
"""Triton forms of the functions in the modules of the same names one level up. Tests run them in Triton's interpreter
and compile them for GPUs; no GPU has run them yet."""
