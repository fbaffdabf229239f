"""What the machine says: memory used, versions, and its errors in plain words."""

from __future__ import annotations

import datetime
import errno
import importlib.metadata
import os
import platform
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from keeptune.errors import TrainingError

LIBRARIES = ("keeptune", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")


def peak_memory() -> int:
    """Largest resident size of this process so far, plus the peak of every GPU, in bytes."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    devices = range(torch.cuda.device_count())
    return host + sum(torch.cuda.max_memory_allocated(i) for i in devices)


def fastest() -> torch.device:
    """The accelerator, where there is one; else the processor."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def memory() -> int:
    """Bytes of this machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def provenance() -> dict[str, Any]:
    """When, where and with which versions a run was started."""
    cores = len(os.sched_getaffinity(0))
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "system": platform.platform(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory() / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": _git_commit(),
    }


def _git_commit() -> str:
    """The commit of the folder the run was started in, with "+" when files were changed."""
    try:
        commit, changed = (
            subprocess.run(
                ["git", *words], check=True, capture_output=True, text=True, timeout=10
            ).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+" if changed else "")


@contextmanager
def translated(settings: dict[str, Any], folder: Path) -> Iterator[None]:
    """Say in a sentence what a full disk or memory means for this run.

    Args:
        settings: The trainer's settings, for the batch size.
        folder: The run folder.

    Raises:
        TrainingError: In place of the machine's own error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise TrainingError(
            f"The disk that holds {folder} is full. Nothing that was saved is lost: free some "
            "space and run again with --resume."
        ) from error
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        size = settings.get("per_device_train_batch_size", 8)
        raise TrainingError(
            f"Memory is full at trainer.per_device_train_batch_size: {size}. Lower it (and raise "
            "trainer.gradient_accumulation_steps to keep the same step) or eval_batch_size, and "
            "run again with --resume; or lower max_length, which needs another --out."
        ) from error


def _is_full(error: OSError | SafetensorError) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"os error {number})" in str(error) for number in full)


def _is_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    exact = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return exact or any(word in str(error).lower() for word in words)
