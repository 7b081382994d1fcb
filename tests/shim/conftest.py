"""Tests of the host path on GPUs that are not there: ``pytest --shim sm_90a,sm_100a -m gpu tests/shim``."""

import pytest
import shim


@pytest.fixture
def driver():
    """The driver of the two GPUs."""
    if not shim.active():
        pytest.skip("needs --shim sm_90a,sm_100a")
    import gpushim

    driver = gpushim.driver()
    if [device.arch for device in driver.devices] != ["sm_90a", "sm_100a"]:
        pytest.skip("needs --shim sm_90a,sm_100a")
    yield driver
    driver.execute, driver.reported_shared = True, 0
