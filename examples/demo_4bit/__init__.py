# SPDX-License-Identifier: Apache-2.0
"""Adapters on a language model in 4 bits: `make demo-4bit`."""

from examples.cores import settle

settle()  # before torch is loaded
