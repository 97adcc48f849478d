# SPDX-License-Identifier: Apache-2.0
"""Policies as they are written: the configuration file, and the options of the command line."""
