"""The loop over tasks: the one long story.

row 0 of R ─► for each task: learn ─► evidence ─► state ─► row t of R

Several processes go through it together: the first one writes, and says where the folder stands.

Every step leaves its result on disk before the next begins, and does nothing when its result is
there already. So a killed run goes on where it was, and `learn` is the same story with one more
task.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from keeptune import state
from keeptune.disk import finish_replacing, verify
from keeptune.errors import FolderError, TrainingError
from keeptune.failures import clear_failure
from keeptune.folder import RunFolder
from keeptune.guard import Guard
from keeptune.harness import score_lm_eval
from keeptune.machine import peak_memory, translated
from keeptune.method import Context
from keeptune.privacy import without_text
from keeptune.processes import first_says, gathered, is_first, processes
from keeptune.progress import Progress
from keeptune.records import Cell, Evidence, Example, Kind, Phase, Routes, TaskEvidence
from keeptune.scorers import cell_score
from keeptune.serving import Prompts, routes, score_served
from keeptune.session import Session
from keeptune.steering import Steering
from keeptune.stream import Task

KEPT_STATES = 2


def _is_finite(weight: Tensor) -> bool:
    own = weight.to_local() if isinstance(weight, DTensor) else weight
    return bool(torch.isfinite(own).all())


class Loop:
    """Runs a session into a run folder.

    Args:
        session: What to run.
        folder: Where everything is kept.
        progress: Who is told.
        stop: Once set, training saves a state and ends with KeyboardInterrupt.
    """

    def __init__(
        self, session: Session, folder: RunFolder, progress: Progress, stop: Event
    ) -> None:
        self.session = session
        self.folder = folder
        self.progress = progress
        self.stop = stop
        self._scored = 0
        self.states = folder.path / "state"
        session.trainer.args.output_dir = str(folder.path / "logs")
        session.trainer.progress_root = self.states / "progress"
        number, count = processes()
        files = self.states / "files"
        session.trainer.files = files if count == 1 else files / str(number)
        # Methods get their states back before the first task, and must meet shards then too.
        session.model = session.trainer.ready()
        self.steering: Steering | None = None
        if session.plan.watch is not None or session.plan.budget is not None:
            self.steering = Steering(session, folder, progress, stop)
        session.trainer.overseer = self.steering
        session.trainer.watch(self._report, session.plan.checkpoint_minutes, stop)

    def run(self) -> None:
        """Go through the stream from where the folder stands to its end.

        Raises:
            TrainingError: Training cannot go on.
            FolderError: A state is damaged.
            KeyboardInterrupt: It was stopped; a state was saved.
        """
        stream = self.session.plan.stream
        done = self.load_last_state()
        with self._status():
            for row in range(done, len(stream) + 1):
                if row > done:
                    self.learn(row - 1)
                self.evaluate(row)
        first_says(None)  # every process is through
        if is_first():
            self._remove_files()

    @contextmanager
    def _status(self) -> Iterator[None]:
        self._set_status("running")
        try:
            with translated(self.session.plan.settings, self.folder.path):
                yield
        except KeyboardInterrupt:
            self._set_status("stopped")
            raise
        except BaseException:
            with suppress(OSError):  # where the disk is full, this cannot be kept either
                self._set_status("failed")
            raise
        self._set_status("done")
        clear_failure(self.folder.path)  # of another try, while this one was at work

    def _set_status(self, status: str) -> None:
        self.folder.info = self.folder.info.model_copy(update={"status": status})
        self.folder.save_info()

    # -- one task -----------------------------------------------------------------------------

    def learn(self, index: int) -> None:
        """Learn one task and keep its evidence and state."""
        task = self.session.plan.stream[index]
        trainer = self.session.trainer
        started, tokens = time.monotonic(), int(trainer.tokens_trained)
        self.progress.task(index + 1, len(self.session.plan.stream), task.name)
        self.progress.phase(f"train {task.name}", 0)
        trainer.learn(
            task.name,
            self.session.tokenised[index].dataset,
            index=index,
            resume=first_says(self._progress_in(index) if is_first() else None),
        )
        self._end_if_asked()
        self._check_weights(task.name)
        trained = sum(gathered(int(trainer.tokens_trained) - tokens))
        aside = trainer.end_task_seconds + (self.steering.seconds if self.steering else 0.0)
        self._add_cost("train", task.name, started + aside, trained)
        self.folder.add_phase(
            Phase(phase="end_task", task=task.name, seconds=trainer.end_task_seconds)
        )
        self._keep(index)

    def _keep(self, index: int) -> None:
        started = time.monotonic()
        chain = self.session.chain
        task = self.session.plan.stream[index].name
        shown = [Evidence(name=m.name(), values=m.evidence()) for m in chain]
        self.folder.write_evidence(TaskEvidence(task=task, index=index, methods=shown))
        with self.session.trainer.folder_to_fill(self.states / f"task-{index + 1:03d}") as files:
            weights = state.own_tensors(self.session.model)
            written = state.write_tensors(files and files / "weights.safetensors", weights)
            sizes = {"weights": written} | state.write_methods(files, chain)
        if files is not None:
            shutil.rmtree(self.states / "progress", ignore_errors=True)
            for old in self._states()[:-KEPT_STATES]:
                shutil.rmtree(self.states / f"task-{old:03d}", ignore_errors=True)
        self._add_cost("save", task, started, stored=sizes)

    def _check_weights(self, task: str) -> None:
        named = self.session.model.named_parameters()
        wrong = (n for n, p in named if p.requires_grad and not _is_finite(p))
        if found := [name for name in gathered(next(wrong, None)) if name]:
            raise TrainingError(
                f"Weights of {found[0]} are not numbers after task {task!r}. The state from before "
                "this task is kept. Run with a lower trainer.learning_rate or method's strength "
                "into another --out."
            )

    # -- state --------------------------------------------------------------------------------

    def _states(self) -> list[int]:
        found = self.states.glob("task-[0-9][0-9][0-9]")
        return sorted(int(path.name.removeprefix("task-")) for path in found)

    def load_last_state(self) -> int:
        """Put the model and the methods where the folder's last finished task left them.

        Returns:
            Number of tasks learned.

        Raises:
            FolderError: The state is damaged; the message says which file, and from where the
                run can go on.
        """
        if is_first():
            self._remove_files()
            for parent in (self.states, self.states / "progress"):
                finish_replacing(parent)
        done = first_says(self._states())
        if not done:
            return 0
        path = self.states / f"task-{done[-1]:03d}"
        try:
            verify(path)
        except FolderError as error:
            raise FolderError(f"{error} {self._way_out(path, done[:-1])}") from error
        ctx = self.session.context(done[-1] - 1)
        state.read_methods(path, self.session.chain, ctx)
        state.put_tensors(self.session.model, load_file(path / "weights.safetensors"))
        return done[-1]

    def _remove_files(self) -> None:
        # What counts of them has a second name in a state.
        shutil.rmtree(self.states / "files", ignore_errors=True)

    def _way_out(self, path: Path, earlier: list[int]) -> str:
        tasks = self.session.plan.stream
        if not earlier:
            return f"No earlier state is kept: delete {path} to start again with --resume."
        last = tasks[earlier[-1] - 1].name
        return (
            f"The last good state is the one after task {last!r}: "
            f"delete {path} to go on from there with --resume."
        )

    def _progress_in(self, index: int) -> Path | None:
        """The newest whole state in the middle of this task; a damaged one is passed over."""
        for path in sorted((self.states / "progress").glob(f"{index:03d}-*"), reverse=True):
            try:
                verify(path)
            except FolderError as error:
                self.progress.warn(f"{error} The run goes on from an earlier state.")
                continue
            rows = len(self.session.tokenised[index].dataset)
            if (then := state.read_json(path / "step.json")["task_rows"]) != rows:
                # As after a request to forget: its steps were of an order that is no more.
                self.progress.warn(
                    f"The task had {then} rows and has {rows} now, so it begins again."
                )
                return None
            self.progress.note(f"going on at step {int(path.name.rpartition('-')[2])}")
            return path
        return None

    # -- one row of R -------------------------------------------------------------------------

    def evaluate(self, row: int) -> None:
        """Fill what is missing of one row of R; the model must stand after task `row`."""
        plan = self.session.plan
        tasks: Sequence[Task | Guard] = list(plan.stream)
        every: dict[Kind, Sequence[Task | Guard]] = {"task": tasks, "guard": plan.guards}
        missing = first_says(
            [
                (kind, index)
                for kind, items in every.items()
                for index in range(len(items))
                if not self.folder.cell_file(row, kind, index).is_file()
            ]
        )
        if not missing:
            return
        started = time.monotonic()
        when = plan.stream[row - 1].name if row else ""
        title = f"evaluate after {when}" if row else "evaluate before training"
        self.progress.phase(title, sum(every[kind][i].size for kind, i in missing), "examples")
        self._scored = 0
        self._ask_for_tasks(row)
        for kind, index in missing:
            self._end_if_asked()
            item, learned = every[kind][index], kind == "task" and index < row
            ctx = self.session.context(max(row - 1, 0))
            cell = self.score(item, ctx, item.name if learned else None)
            self.folder.write_cell(row, kind, index, cell)
        self._add_cost("evaluate", when, started)

    def _ask_for_tasks(self, row: int) -> None:
        """Note which task each question of a learned task would be served as, were it not known."""
        ctx = self.session.context(max(row - 1, 0))
        found = {}
        for task in list(self.session.plan.stream)[:row]:
            if (chosen := routes(self.session, ctx, task.eval)) is None:
                return
            found[task.name] = dict(Counter(chosen))
        if found:
            self.folder.write_routes(row, Routes(tasks=found))

    def score(self, item: Task | Guard, ctx: Context, task: str | None) -> Cell:
        """Score by what is served for a task, or for rows of an unknown one."""
        run, started = self.session, time.monotonic()
        plan, chain = run.plan, run.chain
        prompts = Prompts(chain, ctx)
        rows = item.eval if isinstance(item, Task) else item.rows
        examples: list[Example]
        if isinstance(item, Guard) and rows is None:
            chain.serve(ctx, task)
            with run.trainer.computing():
                examples = score_lm_eval(run.model, run.tokenizer, item, plan.eval_batch_size)
            self._tick(len(examples))
        else:
            assert rows is not None
            examples = score_served(
                run,
                ctx,
                rows,
                item.score,
                task,
                prompts,
                max_new_tokens=item.max_new_tokens,
                tick=self._tick,
            )
        if plan.privacy == "strict":
            examples = [without_text(example) for example in examples]
        return Cell(
            name=item.name,
            score=cell_score(examples, item.unit),
            unit=item.unit,
            n=len(examples),
            seconds=time.monotonic() - started,
            added_tokens=prompts.tokens,
            added_seconds=prompts.seconds,
            truncated=prompts.cut,
            examples=examples,
        )

    # -- telling ------------------------------------------------------------------------------

    def _tick(self, rows: int) -> None:
        self._scored += rows
        self.progress.advance(self._scored)
        # Several processes would wait for the one that ends here.
        if processes()[1] == 1:
            self._end_if_asked()

    def _end_if_asked(self) -> None:
        if any(gathered(self.stop.is_set())):
            raise KeyboardInterrupt

    def _report(self, step: int, steps: int, figures: dict[str, float]) -> None:
        ctx = self.session.trainer.ctx
        task = ctx.task if ctx else ""
        self.progress.phase(f"train {task}", steps)
        self.progress.advance(step, **figures)
        if figures:
            self.folder.log_step(task=task, step=step, **figures)

    def _add_cost(
        self,
        phase: str,
        task: str,
        started: float,
        tokens: int = 0,
        stored: dict[str, int] | None = None,
    ) -> None:
        cost = self.folder.cost()
        spent = Phase(phase=phase, task=task, seconds=time.monotonic() - started, tokens=tokens)
        self.folder.write_cost(
            cost.model_copy(
                update={
                    "phases": [*cost.phases, spent],
                    "peak_memory_bytes": max(cost.peak_memory_bytes, peak_memory()),
                    "stored_bytes": stored or cost.stored_bytes,
                }
            )
        )
