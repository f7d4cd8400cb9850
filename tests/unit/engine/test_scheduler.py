from dataclasses import dataclass, field

from kvservice.engine.scheduler import schedule


@dataclass
class Call:
    """As much of a RunningCall as the scheduler looks at."""

    left: int = 0
    in_prefill: bool = field(init=False)

    def __post_init__(self):
        self.in_prefill = self.left > 0

    def next_tokens(self, chunk_tokens):
        return min(self.left, chunk_tokens)


def planned(calls, chunk=100, max_prefills=2, may_prefill=True):
    plan = schedule(calls, chunk, max_prefills, may_prefill=may_prefill)
    return [(calls.index(item.running), item.num_tokens) for item in plan]


def test_every_decoding_sequence_gets_one_token_in_each_step():
    calls = [Call(), Call(500), Call()]
    calls[0].name = "first"
    plan = schedule(calls, 100, 2, may_prefill=True)
    assert [(item.running is calls[i], item.num_tokens) for i, item in zip((0, 2, 1), plan, strict=True)] == [
        (True, 1),
        (True, 1),
        (True, 100),
    ]


def test_prefills_share_the_chunk_in_order_of_admission():
    assert planned([Call(30), Call(500), Call(9)], max_prefills=3) == [(0, 30), (1, 70)]


def test_only_so_many_prefill_at_a_time():
    assert planned([Call(10), Call(20), Call(30)]) == [(0, 10), (1, 20)]


def test_decoding_goes_on_while_prefill_must_wait():
    assert planned([Call(), Call(10)], may_prefill=False) == [(0, 1)]


def test_nothing_to_do_is_an_empty_plan():
    assert planned([]) == []
