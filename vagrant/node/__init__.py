# SPDX-License-Identifier: Apache-2.0
"""The node image, run as a pod on a node that has nothing of imds-guard: vagrant/node-image."""
