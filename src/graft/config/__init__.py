# SPDX-License-Identifier: Apache-2.0
"""Adapter configurations and their JSON files."""
