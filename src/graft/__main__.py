# SPDX-License-Identifier: Apache-2.0
"""`python -m graft`, which runs the command `graft`."""

from graft.command import main

if __name__ == "__main__":
    main()
