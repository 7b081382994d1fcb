"""What tests of the demo share."""

from __future__ import annotations

import pytest

from cute_ssm.demo import weights


@pytest.fixture(scope="session")
def shipped():
    """The model and the tokenizer that the package ships."""
    return weights.load()
