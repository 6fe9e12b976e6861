# SPDX-License-Identifier: Apache-2.0
"""SHADOW: a small network next to the model; the blocks read and update its state."""
