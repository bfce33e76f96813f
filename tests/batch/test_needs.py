"""What is needed, what is given, and the words between the two."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adabatch.batch.needs import Needs

some_needs = st.builds(
    Needs,
    noise=st.sampled_from([None, "euclidean", "adam"]),
    products=st.booleans(),
    quantile=st.none() | st.floats(0.1, 1),
    l1=st.booleans(),
    layers=st.booleans(),
    examples=st.booleans(),
)


def test_nothing_is_false_and_anything_is_true() -> None:
    assert not Needs()
    assert Needs(l1=True)
    assert Needs(noise="euclidean")
    assert Needs(quantile=0.5)


@given(some_needs)
def test_what_is_given_is_not_lacking(needs: Needs) -> None:
    assert not needs.lacking(needs)
    assert needs.lacking(Needs()) == needs
    assert needs | Needs() == Needs() | needs == needs | needs == needs
    assert len(needs.words()) == len(needs.ways_out())


def test_needs_add_up() -> None:
    assert Needs(noise="adam") | Needs(l1=True, layers=True) == Needs(noise="adam", l1=True, layers=True)
    with pytest.raises(ValueError, match="measures one noise only, got 'adam' and 'sign'"):
        Needs(noise="adam") | Needs(noise="sign")


def test_a_norm_that_is_named_stands() -> None:
    assert Needs(l1=True).with_noise() == Needs(l1=True, noise="euclidean")
    assert Needs(noise="sign").with_noise() == Needs(noise="sign")


def test_each_is_named_with_its_way_out() -> None:
    needs = Needs(noise="adam", products=True, quantile=0.9)
    assert needs.words() == ["noise in the norm adam", "inner products", "coordinates at quantile 0.9"]
    assert Needs(noise="euclidean").words() == ["noise"]
    assert needs.lacking(Needs(noise="adam", quantile=0.5)).words() == ["inner products", "coordinates at quantile 0.9"]
    assert "norm= for 'adam'" in needs.ways_out()[0]
    assert "quantile=0.9" in needs.ways_out()[2]
