"""Runs of one method go to one process, because equal runs are run once a process."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        given = getattr(item, "callspec", None)
        if given is None or "contract" not in item.path.parts:
            continue
        subject = given.params.get("subject")
        name = given.params.get("name") or (subject and subject.cls.name())
        if name:
            item.add_marker(pytest.mark.xdist_group(str(name)))
