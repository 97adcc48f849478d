# SPDX-License-Identifier: Apache-2.0
"""What runs inside the guests. Nothing here is for a machine that somebody works on."""
