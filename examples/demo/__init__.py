# SPDX-License-Identifier: Apache-2.0
"""Two adapters on one MiniLM: `make demo`."""

from examples.cores import settle

settle()  # before torch is loaded
