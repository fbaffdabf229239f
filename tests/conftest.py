"""What every test needs before anything heavy is imported: no network, one thread."""

from __future__ import annotations

import gc
import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Of several processes one has all tests of a file, because they share what is made once; and of
    # the contract all clauses of a method, because equal runs are run once.
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        name = given.get("name")
        if "subject" in given:
            name = given["subject"].cls.name()
        clause = name and item.path.name == "test_contract.py"
        item.add_marker(pytest.mark.xdist_group(str(name if clause else item.path)))


def pytest_collection_finish() -> None:
    # Accelerate collects garbage after every training; looking through all imported modules each
    # time would be nine tenths of a tiny run.
    gc.freeze()


def pytest_runtest_teardown() -> None:
    # Nor is what the test imported and what stays in caches to be looked through again.
    gc.collect()
    gc.freeze()
