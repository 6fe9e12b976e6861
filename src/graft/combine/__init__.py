# SPDX-License-Identifier: Apache-2.0
"""One adapter from several: rules on tensors, and `add_weighted_adapter`."""
