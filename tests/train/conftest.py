import pytest

from tests.train.recorder import Lines


@pytest.fixture
def lines():
    """A log that keeps its lines."""
    return Lines()
