# SPDX-License-Identifier: Apache-2.0
"""The matrix of kernels and userlands. A regular package, so that nobody's `vagrant` from PyPI is taken for it."""
