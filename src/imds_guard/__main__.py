# SPDX-License-Identifier: Apache-2.0
"""``python -m imds_guard``."""

from imds_guard.cli import main

if __name__ == "__main__":
    main()
