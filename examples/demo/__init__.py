# SPDX-License-Identifier: Apache-2.0
"""Two adapters on one MiniLM: `make demo`."""
