# SPDX-License-Identifier: Apache-2.0
"""Adapters as files: read, compare, change and write them without their base model, and mostly without torch."""
