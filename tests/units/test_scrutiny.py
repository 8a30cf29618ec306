"""Who is named as going against the others, and who is not."""

from statistics import median

import pytest

from benchmarks.scrutiny import judged
from server_app.scrutiny import median_without
from strategies import RULES


@pytest.mark.parametrize("data", ["iid", "skewed"])
@pytest.mark.parametrize("name", ["fedit", "flora", "fed-sb", "flasc"])
@pytest.mark.parametrize("kind", ["flip", "scale", "pair"])
def test_one_of_eight_is_named_and_nobody_of_more_than_a_quarter(kind, name, data):
    rule = RULES[name]()
    one = judged(rule, kind, data, (8, 1), seed=1)
    assert (list(one.named), one.camp) == (["07"], 0)
    for hostile in (3, 4, 5):
        many = judged(rule, kind, data, (8, hostile), seed=1)
        assert not many.named
        assert many.camp >= 3 or (name, data) == ("flasc", "skewed"), "sparse updates of unlike nodes hardly meet"


@pytest.mark.parametrize("data", ["iid", "skewed"])
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if name not in {"local", "ravan"}])
def test_honest_nodes_are_not_named(name, data):
    assert judged(RULES[name](), "none", data, (8, 0), seed=1) == ({}, 0)


def test_the_median_of_the_others_is_found_in_the_sorted_values_of_all():
    values = [3.0, 1.0, 1.0, 9.0, 4.0]
    for count in (4, 5):
        some = values[:count]
        for place, value in enumerate(some):
            assert median_without(sorted(some), value) == median(some[:place] + some[place + 1 :])
