# SPDX-License-Identifier: Apache-2.0
"""Measures of the house: what each room holds, how plainly it speaks, and how much a reader must follow."""
