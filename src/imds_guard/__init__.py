# SPDX-License-Identifier: Apache-2.0
"""imds-guard: only the right users and groups reach the instance metadata service."""

__version__ = "0.1.0"

CONFIG_PATH = "/etc/imds-guard/config.toml"
