from __future__ import annotations

import json
import logging

import pytest

from kvservice.telemetry.logging import HumanFormatter, JsonFormatter, configure_logging

logger = logging.getLogger("kvservice.test")


@pytest.fixture
def written(capsys):
    """Gives what was logged so far; the loggers are put back after the test."""
    root, service = logging.getLogger(), logging.getLogger("kvservice")
    handlers, levels = root.handlers[:], (root.level, service.level)
    yield lambda: capsys.readouterr().err
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    service.setLevel(levels[1])


def test_a_json_line_holds_the_event_and_its_fields(written):
    configure_logging("INFO", json=True)
    logger.info("call_refused", extra={"reason": "device_full", "error": ValueError("x")})
    line = json.loads(written())
    assert (line["event"], line["level"], line["logger"]) == ("call_refused", "INFO", "kvservice.test")
    assert (line["reason"], line["error"]) == ("device_full", "x")
    assert line["time"].endswith("+00:00")


def test_an_exception_stays_on_one_json_line(written):
    configure_logging(json=True)
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("step_failed")
    (line,) = written().splitlines()
    assert "ValueError: broken" in json.loads(line)["exception"]


def test_the_human_form_ends_with_the_fields(written):
    configure_logging("INFO")
    logger.warning("lease_lost", extra={"epoch": 3})
    assert written().endswith("WARNING lease_lost epoch=3\n")


def test_below_its_level_nothing_is_written_and_other_libraries_begin_at_warning(written):
    configure_logging("INFO")
    logger.debug("step")
    logging.getLogger("other").info("chatter")
    assert written() == ""


def test_configuring_twice_writes_once(written):
    configure_logging("INFO")
    configure_logging("INFO", json=True)
    logger.info("once")
    assert len(written().splitlines()) == 1


@pytest.mark.parametrize("formatter", [JsonFormatter(), HumanFormatter()])
def test_a_record_without_fields_is_just_the_event(formatter):
    record = logging.LogRecord("kvservice", logging.INFO, __file__, 1, "event_%s", ("a",), None)
    assert "event_a" in formatter.format(record)
