# SPDX-License-Identifier: Apache-2.0
"""The model API: tuner, PeftModel, tasks, status, automatic loading."""
