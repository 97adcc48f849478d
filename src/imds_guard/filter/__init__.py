# SPDX-License-Identifier: Apache-2.0
"""The service of the filters: an HTTP server that passes on what the rules of a filter allow."""
