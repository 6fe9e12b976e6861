# SPDX-License-Identifier: Apache-2.0
"""Injection: from a config and a model to adapted layers, and the report of it."""
