"""What the methods with a quadratic penalty cost, as ratios measured side by side in one run.

    python benchmarks/anchor.py [--small] [--markdown FILE]     # --small leaves out SmolLM2-135M

As `run.py`: one thread, process CPU time, in turns with the order reversed every round, medians;
float32, batches of 8 rows of 64 tokens. What a method adds to a step is timed alone, with real
gradients in place, and divided by a plain step of the same run: 2 % are not to be seen in whole
steps. Goals are printed beside the figures; nothing here is asserted by a test.

Memory is counted, not sampled: at rest, the storages of all living tensors; on the way, every
allocation and release of torch's CPU allocator.
"""

from __future__ import annotations

import argparse
import gc
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the memory profiler talks on stderr

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from keeptune import EWC, L2SP, MAS, SI, Chain, Context, Hierarchical, Method, models
from keeptune.methods._anchor.examples import example_sums, sign_sums
from keeptune.methods._anchor.objectives import log_likelihood
from run import five_million, interleaved, rows

HEADS = ("what", "model", "value", "goal", "verdict")
# No evidence is measured at this step; it is at one in 64, and at the powers of two.
ORDINARY_STEP = 3


@dataclass
class Report:
    """The lines of the table."""

    lines: list[tuple[str, ...]] = field(default_factory=list)

    def add(
        self,
        what: str,
        model: str,
        value: float,
        *,
        most: float | None = None,
        least: float | None = None,
        note: str = "",
    ) -> None:
        """Add a figure with its goal, or with a note on what is claimed or expected."""
        goal, good = note, True
        if most is not None:
            goal, good = f"at most {most:g}", value <= most
        if least is not None:
            goal, good = f"at least {least:g}", value >= least
        verdict = "" if most is None and least is None else "met" if good else "NOT met"
        figure = f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3f}"
        self.lines.append((what, model, figure, goal, verdict))

    def table(self) -> Table:
        table = Table(*HEADS)
        for line in self.lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        lines = [HEADS, ("---", "---", "---:", "---", "---"), *self.lines]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def stack(some: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows of one length."""
    return {key: torch.tensor([row[key] for row in some]) for key in ("input_ids", "labels")}


class Subject:
    """A model in training: its rows, a fused AdamW, and a step with gradients left in place.

    Args:
        name: For the table.
        model: Changed by every step.
        examples: Rows that a Fisher is taken of.
        rounds: How often each variant is timed.
    """

    def __init__(self, name: str, model: Any, examples: int, rounds: int) -> None:
        self.name, self.model, self.rounds = name, model.train(), rounds
        self.data = rows(model.config.vocab_size, examples)
        self.numbers = range(examples)
        self.ctx = self.context(0)
        self.batch = self.ctx.batch(self.data.to_list()[:8])
        self.parameters = list(self.ctx.trainable().values())
        self.adamw = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def context(self, index: int) -> Context:
        ctx = Context(self.model, f"t{index}", index, self.data, stack)
        ctx.step, ctx.learning_rate = ORDINARY_STEP, 1e-5
        return ctx

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    def forward_backward(self, batch: dict[str, Tensor] | None = None) -> None:
        self.adamw.zero_grad()
        self.model(**(batch or self.batch)).loss.backward()

    def epoch(self) -> None:
        """A forward and backward over the rows of the Fisher."""
        listed = self.data.to_list()
        for start in range(0, len(listed), 8):
            self.forward_backward(self.ctx.batch(listed[start : start + 8]))

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.forward_backward()
        (optimizer or self.adamw).step()

    def after(self, method: Method, tasks: int) -> Method:
        """Let a method learn tasks of one step each, and begin one more."""
        for index in range(tasks):
            ctx = self.context(index)
            method.begin_task(ctx)
            self.forward_backward()
            method.gradients(ctx)
            self.adamw.step()
            method.after_step(ctx)
            method.end_task(ctx)
        method.begin_task(self.context(tasks))
        return method


def extra(subject: Subject, method: Method, micro_batches: int = 1, index: int = 1) -> Any:
    """What a method does in one optimizer step, alone."""
    ctx, chain = subject.context(index), Chain([method])

    def run() -> None:
        for _ in range(micro_batches):
            chain.loss(ctx, subject.batch, None)
        chain.gradients(ctx)
        chain.after_step(ctx)

    return run


def naive_penalty(subject: Subject, method: EWC) -> Callable[[], None]:
    """The penalty as a term of the loss, left to autograd."""
    weights, device = subject.ctx.trainable(), subject.ctx.device
    anchor = {name: method._anchor[name].full(device) for name in weights}
    fisher = {name: method._importance[name].full(device) for name in weights}

    def run() -> None:
        terms = [(fisher[n] * (p - anchor[n]) ** 2).sum() for n, p in weights.items()]
        (0.5 * torch.stack(terms).sum()).backward()

    return run


def penalties(report: Report, subject: Subject) -> None:
    """What is added to a training step."""
    ewc = subject.after(EWC(strength=1.0, examples=2), 1)
    after_8 = subject.after(EWC(strength=1.0, examples=2), 8)
    si, l2sp = subject.after(SI(strength=1.0), 1), subject.after(L2SP(strength=0.1), 1)
    assert isinstance(ewc, EWC)
    by_default = torch.optim.AdamW(subject.parameters, lr=1e-5)
    ewc_alone = extra(subject, ewc)

    def whole() -> None:
        subject.forward_backward()
        ewc_alone()
        subject.adamw.step()

    subject.step()
    alone = interleaved(
        {
            "naive": naive_penalty(subject, ewc),
            "ewc": ewc_alone,
            "8 tasks": extra(subject, after_8),
            "4 micro": extra(subject, ewc, micro_batches=4),
            "l2sp": extra(subject, l2sp),
            "si": extra(subject, si),
        },
        3 * subject.rounds,
    )
    step = interleaved(
        {"plain": subject.step, "default": lambda: subject.step(by_default), "ewc": whole},
        subject.rounds,
    )
    name, ewc_extra, plain = subject.name, alone["ewc"], step["plain"]
    report.add("ewc extra / autograd penalty", name, ewc_extra / alone["naive"], most=0.40)
    report.add("ewc extra, 8 past tasks / 1", name, alone["8 tasks"] / ewc_extra, most=1.05)
    report.add("ewc extra, 4 micro batches / 1", name, alone["4 micro"] / ewc_extra, most=1.1)
    report.add("ewc extra / plain step", name, ewc_extra / plain, most=0.03)
    report.add("l2sp extra / plain step", name, alone["l2sp"] / plain, most=0.03)
    report.add("si path and penalty / plain step", name, alone["si"] / plain, most=0.05)
    report.add("autograd penalty / plain step", name, alone["naive"] / plain)
    report.add("whole ewc step / plain step", name, step["ewc"] / plain, most=1.06)
    report.add(
        "whole ewc step, fused AdamW / plain step, default AdamW",
        name,
        step["ewc"] / step["default"],
        most=1.00,
    )


def naive_fisher(subject: Subject) -> dict[str, Tensor]:
    """One row at a time, by autograd."""
    ctx, weights = subject.ctx, subject.ctx.trainable()
    sums = {name: torch.zeros_like(p) for name, p in weights.items()}
    for number in subject.numbers:
        batch = ctx.batch([ctx.dataset[number]])
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        (log_p,) = log_likelihood(batch, ctx.model(**inputs).logits, [number])
        gradients = torch.autograd.grad(log_p, list(weights.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.addcmul_(gradient, gradient)
    return sums


def fishers(report: Report, subject: Subject, most: float) -> None:
    """The Fisher against a plain epoch over the same rows, and against the loop."""
    ctx, weights = subject.ctx, subject.ctx.trainable()
    found: dict[str, Any] = {}

    def exact() -> None:
        found["exact"], found["how"] = example_sums(
            ctx, weights, subject.numbers, log_likelihood, "square"
        )

    def loop() -> None:
        found["loop"] = naive_fisher(subject)

    def signs() -> None:
        sign_sums(ctx, weights, subject.numbers, log_likelihood)

    median = interleaved(
        {"epoch": subject.epoch, "exact": exact, "signs": signs, "loop": loop}, subject.rounds
    )
    errors = [
        ((found["exact"][n] - f).abs().max() / f.abs().max().clamp_min(1e-30)).item()
        for n, f in found["loop"].items()
    ]
    name, by = subject.name, found["how"]
    ours, epoch = median["exact"], median["epoch"]
    report.add(f"Fisher: loop / exact (by {by})", name, median["loop"] / ours, least=1.25)
    report.add("Fisher: largest error / tensor's maximum", name, max(errors), most=1e-5)
    report.add("Fisher: exact / forward and backward", name, ours / epoch, most=most)
    report.add("Fisher: signs / forward and backward", name, median["signs"] / epoch, most=1.10)


def adapted(model: Any, targets: str | Sequence[str]) -> Any:
    """LoRA of rank 16, with a B that is not zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT 0.21 reads an attribute that transformers renamed
        config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=targets)
        wrapped = get_peft_model(model, config)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return wrapped


def adapters(report: Report, subject: Subject) -> None:
    """Penalty and Fisher of adapters alone."""
    ewc = subject.after(EWC(strength=1.0, examples=2), 1)
    subject.step()
    alone = interleaved({"ewc": extra(subject, ewc)}, 3 * subject.rounds)
    step = interleaved({"plain": subject.step}, subject.rounds)
    report.add("ewc extra / LoRA step", subject.name, alone["ewc"] / step["plain"], most=0.005)
    fishers(report, subject, most=1.15)


def living() -> dict[int, int]:
    """Bytes of the storage of every tensor there is, by its address."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return {s.data_ptr(): s.nbytes() for s in storages}


def held(subject: Subject, method: Method, tasks: int) -> int:
    """Bytes that a method adds after so many tasks, inside the next one."""
    subject.step()
    subject.adamw.zero_grad()
    before = living()
    subject.after(method, tasks)
    subject.forward_backward()
    extra(subject, method, index=tasks)()
    subject.adamw.zero_grad()
    return sum(n for address, n in living().items() if address not in before)


def peak(work: Callable[[], None]) -> int:
    """The most bytes that were allocated at one time beyond those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        work()
    events = [e for e in watch.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def memory(report: Report, subject: Subject) -> None:
    """What is held between steps, and what is needed within one."""
    name, n = subject.name, sum(p.numel() for p in subject.parameters)
    largest = max(p.nbytes for p in subject.parameters)
    cases: list[tuple[Method, int, float]] = [
        (EWC(strength=1.0, examples=2), 1, 2.05),
        (EWC(strength=1.0, examples=2), 8, 2.05),
        (MAS(strength=1.0, examples=2), 8, 2.05),
        (SI(strength=1.0), 8, 3.05),
        (L2SP(strength=0.1), 8, 1.05),
    ]
    while cases:
        method, tasks, goal = cases.pop(0)  # one at a time: each holds several models
        title = f"{method.name()} after {tasks} task{'s' if tasks > 1 else ''}"
        ratio = held(subject, method, tasks) / subject.nbytes
        report.add(f"{title}: held / model", name, ratio, most=goal)
        if tasks == 8:
            subject.forward_backward()
            passing = peak(extra(subject, method, index=tasks)) / largest
            report.add(f"{method.name()}: temporaries / largest tensor", name, passing, most=1.0)
    for precision in ("float32", "bfloat16", "uint8"):
        method = EWC(strength=1.0, examples=2, precision=precision)
        each = held(subject, method, 1) / n
        report.add(f"ewc, importance in {precision}: bytes per weight", name, each)


def hierarchical(report: Report, name: str, make: Callable[[], Any], rounds: int) -> None:
    """Song et al.'s claims: 20 times faster than a Fisher pass, 10 to 15 % of the storage.

    The pass is one row at a time over the whole model, as the paper's comparison has it; the
    bookkeeping is what path integral and penalty of q and v add to the steps over as many rows,
    and the importance at the end. It is partly inside the backward, so whole passes are compared.
    """
    plain = Subject(name, make(), 16, rounds)
    full = Subject(name, make(), 16, rounds)
    targets = ["q_proj", "v_proj"]
    bare = Subject(name, adapted(make(), targets), 16, rounds)
    watched = Subject(name, adapted(make(), targets), 16, rounds)
    method = Hierarchical()
    ctx = watched.context(0)

    def steps(subject: Subject, *methods: Method) -> Callable[[], None]:
        chain = Chain(methods)

        def run() -> None:
            chain.begin_task(ctx)
            for _ in range(len(subject.data) // 8):
                subject.forward_backward()
                chain.gradients(ctx)
                chain.after_step(ctx)
            chain.end_task(ctx)

        return run

    def by_hooks() -> None:
        example_sums(full.ctx, full.ctx.trainable(), full.numbers, log_likelihood, "square")

    median = interleaved(
        {
            "bare": steps(bare),
            "watched": steps(watched, method),
            "loop": lambda: naive_fisher(plain),
            "hooks": by_hooks,
        },
        rounds,
    )
    books = median["watched"] - median["bare"]
    note = "claimed: 20"
    report.add("Fisher loop / hierarchical bookkeeping", name, median["loop"] / books, note=note)
    report.add("exact Fisher / hierarchical bookkeeping", name, median["hooks"] / books)
    report.add("hierarchical bookkeeping / LoRA epoch", name, books / median["bare"])
    kept = sum(one.nbytes for one in method._importance.values())
    note = "claimed: 0.10 to 0.15"
    report.add("hierarchical importance of q, v / model", name, kept / plain.nbytes, note=note)


def measure(report: Report, name: str, make: Callable[[], Any], rounds: int, examples: int) -> None:
    penalties(report, Subject(name, make(), examples, rounds))
    fishers(report, Subject(name, make(), examples, max(2, rounds // 3)), most=1.30)
    memory(report, Subject(name, make(), 8, 1))
    lora = adapted(make(), "all-linear")
    adapters(report, Subject(f"{name} LoRA", lora, examples, max(2, rounds // 3)))
    hierarchical(report, name, make, max(2, rounds // 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="leave out SmolLM2-135M")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    given = parser.parse_args()
    report = Report()
    measure(report, "5M", five_million, rounds=9, examples=128)
    if not given.small:
        measure(report, "SmolLM2-135M", lambda: models.load("demo").model, rounds=3, examples=48)
    Console(width=120).print(report.table())
    if given.markdown:
        given.markdown.write_text(report.markdown(), "utf-8")


if __name__ == "__main__":
    main()
