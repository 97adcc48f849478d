# SPDX-License-Identifier: Apache-2.0
"""Policies as people write them: in the configuration file, and in options of the command line."""
