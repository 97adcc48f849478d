# SPDX-License-Identifier: Apache-2.0
"""placeholder"""
def test_wheel():
    import imds_guard
    assert "/job/" not in imds_guard.__file__
