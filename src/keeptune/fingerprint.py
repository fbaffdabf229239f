"""Which weights a model folder holds, as a hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from keeptune.disk import sha256_file

HASHED_WHOLE = 2 << 30  # bytes of weights up to which every byte is hashed
SAMPLES, SAMPLE = 64, 1 << 20  # of larger files: so many pieces of so many bytes


def identity(folder: Path) -> str:
    """Say which weights a model folder holds.

    Returns:
        "sha256:…" over config.json and every byte of the safetensors files when those are at most
        2 GiB together, else "sampled:…" over config.json and, of each file, its size and 64
        evenly spaced pieces of 1 MiB, the header among them.
    """
    weights = sorted(folder.glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in weights) <= HASHED_WHOLE
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weights:
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        digest.update(sha256_file(file).encode() if whole else _samples(file))
    return f"{'sha256' if whole else 'sampled'}:{digest.hexdigest()}"


def _samples(file: Path) -> bytes:
    last = max(file.stat().st_size - SAMPLE, 0)
    pieces = []
    with file.open("rb") as handle:
        for i in range(SAMPLES):
            handle.seek(last * i // (SAMPLES - 1))
            pieces.append(handle.read(SAMPLE))
    return b"".join(pieces)
