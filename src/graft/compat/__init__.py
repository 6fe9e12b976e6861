# SPDX-License-Identifier: Apache-2.0
"""Names that other libraries know, for what graft does."""
