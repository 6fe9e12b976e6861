# SPDX-License-Identifier: Apache-2.0
"""PEFT's own tests, run with graft under PEFT's name: `make test-peft`. Nothing of PEFT is kept here."""
