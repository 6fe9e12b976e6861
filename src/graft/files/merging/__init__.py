# SPDX-License-Identifier: Apache-2.0
"""Merging of adapter files into the files of a model, as a stream over its tensors."""
