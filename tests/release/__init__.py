# SPDX-License-Identifier: Apache-2.0
"""A guard that an earlier release left in the kernel, and this tree's commands over it; and the way back."""
