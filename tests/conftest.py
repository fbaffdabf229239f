"""What every test needs before anything heavy is imported: no network, one thread."""

from __future__ import annotations

import functools
import gc
import os
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    CUBLAS_WORKSPACE_CONFIG=":4096:8",
)

import pytest
import torch
from accelerate.utils import imports
from xdist.scheduler import LoadScopeScheduling

torch.set_num_threads(1)
# Accelerate looks through the installed packages at each training, a twentieth of a tiny one.
imports._is_package_available = functools.cache(imports._is_package_available)
if torch.cuda.is_available():
    # Or sums come out in another order each time, and no two runs agree to the last bit.
    torch.use_deterministic_algorithms(True)

WAITING = ("test_parallel.py", "test_compare_kill.py", "test_kill.py", "test_spread_runs.py")


class _Together(LoadScopeScheduling):  # type: ignore[misc]
    """Of several processes one has all tests of a file, because they share what is made once.

    Of the contract one has all clauses of a method, because equal runs are run once. `--dist
    loadgroup` would be the way, but xdist 3.8 marks the groups where pytest 9.2 does not look.
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        name = test.partition("[")[2].partition("]")[0].partition("-")[0]
        return f"{file}::{name}" if file.endswith("/test_contract.py") else file


@pytest.hookimpl(optionalhook=True)  # unknown where xdist is not used
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Together:
    config.option.loadscopereorder = False  # xdist's own order is by the number of tests
    return _Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What waits for processes of its own comes first, or one would work on alone in the end.
    items.sort(key=lambda item: item.path.name not in WAITING)


def pytest_collection_finish() -> None:
    # Accelerate collects garbage after every training; looking through all imported modules each
    # time would be nine tenths of a tiny run.
    gc.freeze()


def pytest_runtest_teardown() -> None:
    # Nor is what the test imported and what stays in caches to be looked through again.
    gc.collect()
    gc.freeze()
