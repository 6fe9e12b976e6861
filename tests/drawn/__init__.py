# SPDX-License-Identifier: Apache-2.0
"""Drawn mutations: changes of the package that a seed draws from its syntax trees, and which tests notice them."""
