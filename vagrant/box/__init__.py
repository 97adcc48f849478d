# SPDX-License-Identifier: Apache-2.0
"""The rows of kernels.toml as Vagrant machines: a box that boots a row's kernel, and a machine brought up from it."""
