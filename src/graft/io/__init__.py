# SPDX-License-Identifier: Apache-2.0
"""Adapters as files: adapter_config.json and adapter_model.safetensors, in PEFT's layout."""
