# SPDX-License-Identifier: Apache-2.0
"""What a release needs: checks of what was built, and of what a release says."""
