import pytest

from kvservice.compression.protocols import RECALL_INDEXES


@pytest.fixture(autouse=True, scope="session")
def methods():
    RECALL_INDEXES.discover("kvservice.methods")
