# SPDX-License-Identifier: Apache-2.0
"""What is locked, for whom, and how a connect is decided: values and pure functions."""
