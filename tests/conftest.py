"""What all tests share. Loads neither torch nor a server by itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Read by torch when it is first imported, here and in every process that a test starts: the suite shares two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test may wait for, or depend on, a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["tests.redis_fixtures"]

settings.register_profile(
    "ci", derandomize=True, max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("dev", max_examples=200, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

REAL_MODEL = "smollm2-135m"


@pytest.fixture(scope="session")
def real_model_folder() -> Path:
    """The folder of the real small model, fetched once if it isn't there."""
    from kvservice.models.fetch import fetch

    return fetch(REAL_MODEL, cache_dir=None, progress=print)
