# SPDX-License-Identifier: Apache-2.0
"""What a training script needs around adapters."""
