"""One of the processes that go through whole runs together.

Started as a script by test_spread_runs.py, through torchrun: `spread_driver.py FOLDER`.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch

from keeptune import runs
from keeptune.errors import KeeptuneError
from keeptune.recipe import load_recipe
from keeptune.trainers import Checkpoints
from parallel_driver import fresh_accelerator

STOPPED_AT = 3  # steps of the second task


def stop_in_the_second_task() -> None:
    """Ask one process alone to stop, as a scheduler may."""
    original = Checkpoints.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.ctx is not None
        if (self.ctx.index, self.state.global_step) == (1, STOPPED_AT - 1):
            Checkpoints.training_step = original  # type: ignore[method-assign]
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    Checkpoints.training_step = step  # type: ignore[method-assign]


def main(root: Path) -> None:
    """Run each recipe of the folder that is meant for several processes."""
    for name in ("ddp", "fsdp"):
        with fresh_accelerator(fsdp=name == "fsdp"):
            runs.run(load_recipe(root / f"{name}.yaml"))
    with fresh_accelerator(fsdp=False):
        runs.learn(root / "ddp", str(root / "task2.jsonl"), name="t2")
    stop_in_the_second_task()
    for name in ("stopped", "stopped-fsdp"):
        with fresh_accelerator(fsdp=name == "stopped-fsdp"):
            try:
                runs.run(load_recipe(root / f"{name}.yaml"))
            except KeyboardInterrupt:
                stop_in_the_second_task()
    with fresh_accelerator(fsdp=True):
        runs.run(load_recipe(root / "stopped-fsdp.yaml"), resume=True)
    with fresh_accelerator(fsdp=False):
        try:
            runs.run(load_recipe(root / "one.yaml", [f"out={root}/alone"]), resume=True)
        except KeeptuneError as error:
            (root / f"refused-{os.environ['RANK']}").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest
    main(Path(sys.argv[1]))
