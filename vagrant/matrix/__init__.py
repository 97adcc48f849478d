# SPDX-License-Identifier: Apache-2.0
"""Boots real kernels in QEMU and runs the suite against the installed wheel in each of them."""
