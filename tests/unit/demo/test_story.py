from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvservice.client import AppendResult, Finished, Timings
from kvservice.demo.reader import Question, Reader
from kvservice.demo.screen import Screen
from kvservice.demo.story import is_as_promised
from kvservice.types import FinishReason, KvTelemetry, Usage


def reader(recipe: str, answer: str, kv: KvTelemetry) -> Reader:
    timings = Timings(queue_ms=0, prefill_ms=100, ttft_ms=40, decode_ms=30, total_ms=70)
    finished = Finished(
        sequence=9,
        finish_reason=FinishReason.STOP,
        usage=Usage(completion_tokens=4),
        timings=timings,
        kv=kv,
        num_tokens=100,
        durable_tokens=100,
        degraded="",
    )
    read = AppendResult(num_tokens=100, durable_tokens=100, usage=Usage(), timings=timings, kv=kv)
    return Reader(recipe, f"session-{recipe}", read, [answer], [finished])


DENSE = reader("dense", " 12345", KvTelemetry(window_bytes=1010, dense_bytes=1000))
EXACT = reader("exact", " 12345.", KvTelemetry(window_bytes=70, host_bytes=930, redis_bytes=930, dense_bytes=1000))
RECALL = reader(
    "recall",
    "12345. Remember it",
    KvTelemetry(
        window_bytes=70,
        index_bytes=80,
        slot_bytes=30,
        host_bytes=930,
        redis_bytes=930,
        dense_bytes=1000,
        recall_lookups=200,
        recall_hits=150,
    ),
)


@pytest.fixture
def page() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def screen(page: io.StringIO) -> Screen:
    return Screen(Console(file=page, width=80, highlight=False))


def test_figures_of_a_session_are_those_of_its_answers() -> None:
    assert RECALL.device_bytes == 180
    # The index isn't exact KV.
    assert RECALL.off_device == pytest.approx(0.9)
    assert DENSE.off_device == 0.0
    assert RECALL.hit_rate == 0.75
    assert DENSE.hit_rate is None
    assert RECALL.ttft_ms == 40
    assert RECALL.ms_per_token == 10


def test_three_right_answers_with_the_kv_off_the_device_are_a_success(screen: Screen, page: io.StringIO) -> None:
    assert is_as_promised(screen, [DENSE, EXACT, RECALL], "12345")
    assert "90.0%" in page.getvalue()


@pytest.mark.parametrize("answer", ["123456", "the 99999, not 12345", "a key", ""])
def test_one_wrong_answer_is_a_failure_that_names_the_recipe(screen: Screen, page: io.StringIO, answer: str) -> None:
    wrong = reader("exact", answer, EXACT.kv)
    assert not is_as_promised(screen, [DENSE, wrong, RECALL], "12345")
    assert "not answered by: exact" in page.getvalue()


def test_kv_that_stayed_on_the_device_is_a_failure(screen: Screen, page: io.StringIO) -> None:
    heavy = reader("recall", "12345", KvTelemetry(window_bytes=150, slot_bytes=60, dense_bytes=1000))
    assert not is_as_promised(screen, [DENSE, EXACT, heavy], "12345")
    assert "only 79.0%" in page.getvalue()


def test_the_table_names_every_owner_and_fits_80_columns(screen: Screen, page: io.StringIO) -> None:
    screen.bytes_by_owner([DENSE, EXACT, RECALL], weight_bytes=2_000_000, workspace_bytes=1_000_000)
    lines = page.getvalue().splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    for owner in ("sinks and window", "recall slots", "index", "host memory", "Redis", "recall hit rate", "per token"):
        assert any(owner in line for line in lines)


def test_answers_stand_side_by_side_once_they_are_whole(screen: Screen, page: io.StringIO) -> None:
    with screen.answers(2, "Who?", "It was", ["dense", "recall"]) as show:
        for piece in ("Mr.", " [Allen]"):
            show("dense", piece)
        show("recall", "Mrs. Allen")
        assert "Allen" not in page.getvalue()
    assert any("Mr. [Allen]" in line and "Mrs. Allen" in line for line in page.getvalue().splitlines())


def test_on_a_terminal_answers_grow_piece_by_piece(page: io.StringIO) -> None:
    screen = Screen(Console(file=page, width=80, force_terminal=True, highlight=False))
    with screen.answers(2, "Who?", "It was", ["dense", "recall"]) as show:
        show("dense", "Mr.")
        assert "Mr." in page.getvalue()


def test_a_progress_bar_is_drawn_on_a_terminal_only(screen: Screen, page: io.StringIO) -> None:
    with screen.reading("recall") as on_progress:
        on_progress(512, 4096)
    assert page.getvalue() == ""
    terminal = io.StringIO()
    with Screen(Console(file=terminal, width=80, force_terminal=True)).reading("recall") as on_progress:
        on_progress(2048, 4096)
    assert "50%" in terminal.getvalue()


def test_a_question_is_put_in_raw_form_for_the_model_to_go_on() -> None:
    question = Question("What is the pass key?", "The pass key is", 8)
    assert question.prompt == "\nWhat is the pass key? The pass key is"
