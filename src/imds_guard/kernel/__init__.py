# SPDX-License-Identifier: Apache-2.0
"""The boundary to the kernel and to other programs: integers, bytes and file descriptors, never a Policy."""
