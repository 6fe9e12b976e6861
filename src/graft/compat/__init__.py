# SPDX-License-Identifier: Apache-2.0
"""graft under names that other libraries know."""
