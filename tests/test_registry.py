"""Published names, and methods that come in another package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import keeptune
import keeptune.methods
from keeptune import registry
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import Method
from keeptune.methods.ewc import EWC
from pencil import Softmax, context

OWN = sorted(path.stem for path in Path(keeptune.methods.__path__[0]).glob("[a-z]*.py"))


class Mine(Method):
    """A method of another package."""


not_a_method = 3


def test_the_published_names() -> None:
    assert [name for name in registry.names() if name in OWN] == OWN


def test_a_name_gives_its_class() -> None:
    assert registry.get("ewc") is EWC
    assert all(registry.get(name).name() == name for name in OWN)


def test_a_method_is_built_from_its_settings() -> None:
    method = registry.build("ewc", {"strength": 7})
    assert isinstance(method, EWC)
    assert method.strength == 7.0
    assert registry.build("ewc") == registry.build("ewc", {})


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(MethodError, match=r"^There is no method 'ecw'\. Did you mean 'ewc'\?$"):
        registry.get("ecw")


def test_an_unknown_name_far_from_all_gets_the_list() -> None:
    with pytest.raises(MethodError, match=r"no method 'xyz'\. Allowed: .*ewc, .*lwf"):
        registry.build("xyz")


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(MethodError, match=r"EWC\.strengths is not a setting.*'strength'"):
        registry.build("ewc", {"strengths": 1})


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another package is installed that brings methods, all but one of them broken."""
    points = [
        EntryPoint(name, value, registry.GROUP)
        for name, value in {
            "mine": "test_registry:Mine",
            "gone": "no_such_package.gone:Gone",
            "renamed": "test_registry:Renamed",
            "number": "test_registry:not_a_method",
            "ewc": "test_registry:Mine",
            "alias": "test_registry:Mine",
        }.items()
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry.get.cache_clear()
    yield
    registry.get.cache_clear()


@pytest.mark.usefixtures("foreign")
def test_a_method_of_another_package_is_one_like_the_others() -> None:
    assert "mine" in registry.names()
    assert registry.get("mine") is Mine
    method = registry.build("mine")
    Chain([method, EWC()]).begin_task(context(Softmax([[0.0]])))


@pytest.mark.usefixtures("foreign")
def test_another_package_cannot_take_a_name_of_ours() -> None:
    assert registry.get("ewc") is EWC
    assert registry.names().count("ewc") == 1


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("name", ["gone", "renamed"])
def test_a_broken_package_is_named(name: str) -> None:
    with pytest.raises(MethodError, match=rf"method {name!r} of another package .*uninstall"):
        registry.get(name)


@pytest.mark.usefixtures("foreign")
def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(MethodError, match=r"'number' .* is not a keeptune Method"):
        registry.get("number")


@pytest.mark.usefixtures("foreign")
def test_a_name_that_only_recipes_would_know_is_refused() -> None:
    with pytest.raises(MethodError, match=r"'alias' .* called 'mine' everywhere else"):
        registry.get("alias")


def test_every_own_method_is_exported_under_its_class_name() -> None:
    exported = registry.by_class_name()
    assert len(exported) == len(OWN)
    assert all(getattr(keeptune, name) is cls for name, cls in exported.items())
    assert set(exported) <= set(dir(keeptune))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = keeptune.Nonsense
