from __future__ import annotations

import threading

import pytest
from tensorwright import settings
from tensorwright.ir.errors import InputError
from tensorwright.settings import config, flags


def test_a_block_sets_flags_and_puts_them_back():
    before = flags()
    with config(threads=3, validate=True) as inside:
        assert inside.threads == 3 and flags().validate
        with config(threads=1):
            assert flags().threads == 1 and flags().validate
        assert flags().threads == 3
    assert flags() == before


def test_a_block_is_put_back_after_an_error():
    before = flags()
    with pytest.raises(RuntimeError), config(threads=3):
        raise RuntimeError
    assert flags() == before


def test_a_block_does_not_reach_other_threads():
    seen = []
    with config(cache_bytes=7):
        t = threading.Thread(target=lambda: seen.append(flags().cache_bytes))
        t.start()
        t.join()
    assert seen != [7]


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv("TENSORWRIGHT_THREADS", "5")
    monkeypatch.setenv("TENSORWRIGHT_VALIDATE", "yes")
    monkeypatch.setenv("TENSORWRIGHT_CACHE", "off")
    assert (flags().threads, flags().validate, flags().cache) == (5, True, "off")
    with config(threads=2):
        assert flags().threads == 2


@pytest.mark.parametrize(
    ("name", "text"), [("THREADS", "many"), ("THREADS", "0"), ("THREADS", "-1"), ("VALIDATE", "perhaps"), ("CACHE_BYTES", "1e9")]
)
def test_a_variable_that_makes_no_sense_is_an_error_that_names_it(monkeypatch, name, text):
    monkeypatch.setenv(f"TENSORWRIGHT_{name}", text)
    with pytest.raises(InputError, match=f"TENSORWRIGHT_{name}"):
        flags()


@pytest.mark.parametrize("changes", [{"thread": 1}, {"threads": 0}, {"threads": 1.0}, {"validate": 1}, {"cache": None}])
def test_values_that_make_no_sense_in_a_block(changes):
    with pytest.raises(InputError), config(**changes):
        pass


def test_flags_that_change_code_are_in_the_cache_key():
    names = {n for n, _ in flags().code_flags()}
    assert names == {"target", "checked", "winograd", "cuda_loops"}
    with config(checked=True):
        assert ("checked", True) in flags().code_flags()


def test_every_flag_is_described():
    rows = settings.describe()
    assert all(variable == f"TENSORWRIGHT_{name.upper()}" and meaning for name, variable, _, meaning in rows)
    assert len(rows) >= 8
