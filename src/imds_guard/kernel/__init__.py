# SPDX-License-Identifier: Apache-2.0
"""The boundary to the kernel and to other programs: ints, octets and file descriptors, never a Policy."""
