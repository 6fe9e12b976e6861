# SPDX-License-Identifier: Apache-2.0
"""The compat room: graft under names that other libraries know. Its only package is `graft.compat.peft`."""
