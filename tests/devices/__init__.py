"""Checks that need several devices or processes, run by the tests in processes of their own.

Their files are not named ``test_…``, so that pytest does not collect them in a process that has
one device. To run some by hand::

    XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest tests/devices/placement.py
"""
