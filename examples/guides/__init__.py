# SPDX-License-Identifier: Apache-2.0
"""Short examples of one idea each, as scripts and notebooks: `make examples`."""

from examples.cores import settle

settle()  # before torch is loaded
