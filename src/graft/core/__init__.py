# SPDX-License-Identifier: Apache-2.0
"""The core: an adapter is a Method on a Site, run by an AdapterLayer. It knows torch and kernels, nothing else."""
