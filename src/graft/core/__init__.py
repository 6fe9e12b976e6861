# SPDX-License-Identifier: Apache-2.0
"""What an adapter is: a Method on a Site, run by an AdapterLayer. Knows torch and kernels, nothing else."""
