# SPDX-License-Identifier: Apache-2.0
"""The model API: PeftModel, its tuner and registry, task classes, status, loading and saving."""
