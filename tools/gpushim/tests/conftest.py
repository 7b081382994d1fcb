"""This process gets two GPUs: run these tests alone, ``pytest tools/gpushim/tests``."""

import pytest

import gpushim


def pytest_configure(config):
    folder = config.cache.mkdir("gpushim")
    gpushim.install([gpushim.Device("sm_90a", 132), gpushim.Device("sm_100a", 148)], folder)


@pytest.fixture
def driver():
    """The driver, with nothing noted and device 0 current."""
    driver = gpushim.driver()
    driver.device, driver.execute, driver.reported_shared = 0, True, 0
    driver.clear()
    return driver
