# SPDX-License-Identifier: Apache-2.0
"""The service of the filters: what it refuses, what a metadata service receives of it, and what it costs."""
