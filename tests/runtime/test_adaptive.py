from __future__ import annotations

from tensorwright.runtime.adaptive import ThreadChoice


def spend(choice: ThreadChoice, calls: int, one: float, all_: float) -> tuple[float, list[int]]:
    """Seconds spent and the ways taken in some calls, when they cost this much each."""
    total, ways = 0.0, []
    for _ in range(calls):
        ways.append(choice.index)
        cost = (one, all_)[choice.index]
        total += cost
        choice.record(cost)
    return total, ways


def test_it_starts_with_all_threads_tries_one_and_keeps_the_faster():
    assert spend(ThreadChoice(), 8, one=2.0, all_=1.0)[1] == [1, 1, 0, 0, 1, 1, 1, 1]
    assert spend(ThreadChoice(), 12, one=1.0, all_=2.0)[1] == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]


def test_finding_out_costs_little():
    for one, all_ in ((1.0, 0.5), (0.5, 1.0), (1.0, 100.0), (1e-5, 3e-5)):
        choice = ThreadChoice()
        spend(choice, 8, one, all_)
        best = min(one, all_)
        assert spend(choice, 20_000, one, all_)[0] < 20_000 * best * 1.06
    choice = ThreadChoice()
    spend(choice, 10_000, one=2.0, all_=1.0)
    assert spend(choice, 10_000, one=2.0, all_=1.0)[0] < 10_000 * 1.003, "trying one thread must become rare"


def test_a_neighbour_that_comes_and_goes_is_noticed():
    choice = ThreadChoice()
    spend(choice, 1000, one=2.0, all_=1.0)
    _, ways = spend(choice, 100, one=2.0, all_=30.0)
    assert ways[:3] == [1, 1, 0] and sum(ways) <= 6
    calls = 0
    while choice.index == 0:  # the neighbour has gone
        choice.record(2.0)
        calls += 1
        assert calls < 40 * 30 / 2 + 2
    assert sum(spend(choice, 100, one=2.0, all_=1.0)[1]) >= 96


def test_one_slow_call_decides_nothing():
    choice = ThreadChoice()
    spend(choice, 20, one=2.0, all_=1.0)
    assert choice.index == 1
    choice.record(500.0)
    assert choice.index == 1
    choice.record(1.0)
    assert sum(spend(choice, 20, one=2.0, all_=1.0)[1]) == 20


def test_after_a_short_disturbance_all_threads_come_back_soon():
    choice = ThreadChoice()
    spend(choice, 1000, one=2.0, all_=1.0)
    _, ways = spend(choice, 2, one=2.0, all_=4.0)
    assert ways == [1, 1] and choice.index == 0
    assert sum(spend(choice, 20, one=2.0, all_=1.0)[1]) >= 14


def test_short_disturbances_one_after_the_other_do_not_keep_one_thread():
    """Every 60 units two calls on all threads take eight times as long; the rest of the time all threads are twice as fast."""
    choice = ThreadChoice()
    spend(choice, 100, one=2.0, all_=1.0)
    ways: list[int] = []
    for _ in range(30):
        ways += spend(choice, 2, one=2.0, all_=8.0)[1]
        ways += spend(choice, 60, one=2.0, all_=1.0)[1]
    assert sum(ways) > 0.7 * len(ways)


def test_the_first_calls_prove_nothing_against_all_threads():
    choice = ThreadChoice()
    for seconds in (100.0, 25.0):  # pages of the outputs are made
        choice.record(seconds)
    assert sum(spend(choice, 40, one=6.5, all_=3.0)[1]) >= 35


def test_tries_of_one_thread_do_not_end_the_peace():
    choice = ThreadChoice()
    spend(choice, 90, one=2.0, all_=1.0)  # a try every 40 calls at first
    spend(choice, 2, one=2.0, all_=4.0)
    assert choice.index == 0
    assert sum(spend(choice, 20, one=2.0, all_=1.0)[1]) >= 14
