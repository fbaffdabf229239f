"""The whole command killed in the middle of a run: the same command again does what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pico
from keeptune import cli
from keeptune.folder import RunFolder

RECIPE = """\
model: tiny
adapter: none
tasks:
  - {name: a, train: a.jsonl, eval: a.jsonl, recall: true}
  - {name: b, train: b.jsonl, eval: b.jsonl, recall: true}
trainer: {max_steps: 30, per_device_train_batch_size: 4, learning_rate: 0.01, report_to: none}
checkpoint_minutes: 0
"""


def command(methods: str) -> list[str]:
    return ["compare", "r.yaml", "--methods", methods, "--out", "out"]


def started(tmp_path: Path, methods: str) -> subprocess.Popen[str]:
    with (tmp_path / "shown.txt").open("w") as shown:
        return subprocess.Popen(
            [sys.executable, "-m", "keeptune", *command(methods)],
            cwd=tmp_path, stdout=shown, stderr=shown, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def found(out: Path, pattern: str) -> list[Path]:
    return list(out.glob(pattern))


def test_a_killed_comparison_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pico.tiny_folder(tmp_path)
    for name in ("a", "b"):
        rows = [{"prompt": f"{name}{i}:", "completion": f" {chr(97 + i)}"} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "r.yaml").write_text(RECIPE)
    out = tmp_path / "out"
    process = started(tmp_path, "plain,replay")
    end = time.monotonic() + 300
    while not found(out, "replay-*/state/progress/001-*/manifest.json"):
        assert process.poll() is None, (tmp_path / "shown.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (finished,), (stopped,) = found(out, "plain-*/run.json"), found(out, "replay-*/run.json")
    before = finished.stat().st_mtime_ns, finished.read_bytes()
    assert RunFolder(finished.parent).info.status == "done"
    assert RunFolder(stopped.parent).info.status == "running"

    # Again, now with one more, which fails: there is no base model under all weights.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["keeptune", *command("plain,replay,self_rewrite(writer=base)")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "3 runs, 1 finished before\n" in shown.err
    assert "1 of 3 runs failed. The same command tries them again, and only them." in shown.err
    assert (finished.stat().st_mtime_ns, finished.read_bytes()) == before
    resumed = RunFolder(stopped.parent)
    assert resumed.info.status == "done"
    assert [p.phase for p in resumed.cost().phases].count("load") == 2
    assert [p.task for p in resumed.cost().phases if p.phase == "train"] == ["a", "b"]
    page = (out / "comparison.html").read_text("utf-8")
    sentence = next(iter(out.glob("self_rewrite-*/error.txt"))).read_text().splitlines()[0]
    assert "SelfRewrite.writer is 'base'" in sentence
    assert sentence in shown.err
    assert "but all weights are trained and there is no base" in page
    assert "plain" in shown.out
    assert "Report:      out/comparison.html\n" in shown.out
