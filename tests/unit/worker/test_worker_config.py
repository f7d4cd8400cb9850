from __future__ import annotations

import pytest
from pydantic import ValidationError

from kvservice.config.worker import WorkerConfig


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 * 2**20), ("1.5GiB", 3 * 2**29), ("3GB", 3 * 10**9), ("64 KiB", 65536), ("7", 7), (7, 7)],
)
def test_sizes_take_binary_and_decimal_units(text, size):
    assert WorkerConfig(kv_bytes=text).kv_bytes == size


@pytest.mark.parametrize("text", ["", "0", "-1MiB", "many", "5 apples", "nan", "infGiB", 0, -1, None])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ValidationError, match="kv_bytes"):
        WorkerConfig(kv_bytes=text)


def test_defaults_are_what_the_design_recommends():
    config = WorkerConfig()
    assert (config.kv_bytes, config.recipe, config.step_tokens) == (512 * 2**20, "recall", 512)
    assert config.worker_id != WorkerConfig().worker_id


def test_a_setting_nobody_knows_is_refused():
    with pytest.raises(ValidationError, match="kv_byte"):
        WorkerConfig(kv_byte=1)


@pytest.mark.parametrize("recipe", ["magic", "recall-oracle"])
def test_a_default_recipe_that_is_not_served_is_refused_with_those_that_are(recipe):
    with pytest.raises(ValidationError, match="dense, exact, recall"):
        WorkerConfig(recipe=recipe)


def test_the_url_of_redis_with_its_password_is_not_shown():
    assert "hunter2" not in repr(WorkerConfig(redis_url="redis://:hunter2@127.0.0.1:1/0"))
