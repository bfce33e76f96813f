"""An engine inside a host answers everything as the engine in it does."""

from __future__ import annotations

from torch import nn

from adabatch.runtime.collectives import Collectives
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.engines.hosted import HostedEngine
from adabatch.runtime.engines.plain import PlainEngine


def test_all_properties_of_the_inner_engine_hold_in_a_host() -> None:
    inner = PlainEngine(nn.Linear(1, 1), Collectives())
    properties = list(Engine.__annotations__)
    assert "holds_gradients" in properties
    for name in properties:
        other = "update" if name == "reduced" else not getattr(inner, name)
        setattr(inner, name, other)
    hosted = HostedEngine(inner, synchronizes=lambda last: None, ended=lambda: None)
    assert {name: getattr(hosted, name) for name in properties} == {name: getattr(inner, name) for name in properties}


def test_no_method_of_an_engine_is_forgotten() -> None:
    methods = {name for name, member in vars(Engine).items() if callable(member) or isinstance(member, property)}
    public = {name for name in methods if not name.startswith("_")}
    assert "no_sync" in public
    assert public <= vars(HostedEngine).keys()
