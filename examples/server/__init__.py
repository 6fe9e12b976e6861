# SPDX-License-Identifier: Apache-2.0

from examples.cores import settle

settle()  # before torch is loaded
