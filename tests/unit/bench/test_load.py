import random

from kvservice.bench.load import random_ids, rotated_ids


def test_random_ids_are_a_function_of_the_generator_and_stay_in_range() -> None:
    first, again = (random_ids(random.Random(7), 500, 49152) for _ in range(2))
    assert first == again
    assert len(first) == 500
    assert min(first) >= 10
    assert max(first) <= 40_000


def test_random_ids_fit_a_small_vocabulary() -> None:
    assert max(random_ids(random.Random(7), 500, 256)) < 256


def test_a_text_is_rotated_and_repeated_to_the_length_asked_for() -> None:
    assert rotated_ids([1, 2, 3], 7, start=4) == [2, 3, 1, 2, 3, 1, 2]
