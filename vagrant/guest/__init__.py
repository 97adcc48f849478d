# SPDX-License-Identifier: Apache-2.0
"""Code that runs inside the guests. None of it is for a machine that somebody works on."""
