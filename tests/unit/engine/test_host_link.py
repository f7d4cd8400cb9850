import pytest

from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.models.tiny import tiny_model
from kvservice.tier import link
from tests.unit.engine.driving import Drive, answering, group_bytes, make_engine, tokens

RATE = 1000


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0)


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Bytes of each time that the link held a step up."""
    sizes: list[float] = []
    monkeypatch.setattr(link.time, "sleep", lambda seconds: sizes.append(seconds * RATE))
    return sizes


def test_what_is_recalled_passes_the_link(model, carried) -> None:
    drive = Drive(make_engine(model, host_link_bytes_per_s=RATE))
    drive.ask("a", RECALL, document=tokens(600))
    carried.clear()
    finished = drive.ask("a", RECALL, base=tokens(600), prompt=(7,), sampling=answering(5))
    assert sum(carried) == pytest.approx(finished.telemetry.recalled_bytes)
    assert finished.telemetry.recalled_bytes > 0


def test_every_group_passes_the_link_where_all_are_attended_to(model, carried) -> None:
    drive = Drive(make_engine(model, host_link_bytes_per_s=RATE))
    drive.ask("a", EXACT, document=tokens(600))
    carried.clear()
    drive.ask("a", EXACT, base=tokens(600), prompt=(7,), sampling=answering(5))
    groups = EXACT.distant_groups(600)
    assert carried == [pytest.approx(group_bytes(model, groups))] * 5


def test_what_stays_on_the_device_passes_no_link(model, carried) -> None:
    drive = Drive(make_engine(model, host_link_bytes_per_s=RATE))
    drive.ask("a", DENSE, document=tokens(600), prompt=(7,), sampling=answering(5))
    assert carried == []
