# SPDX-License-Identifier: Apache-2.0
"""From a config and a model to adapted layers, and the account of what was done."""
