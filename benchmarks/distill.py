"""What distillation and rehearsal cost, as ratios measured side by side in one run.

    python benchmarks/distill.py [--small] [--markdown FILE]     # --small leaves out SmolLM2-135M

As `anchor.py`: one thread, process CPU time, in turns with the order reversed every round, medians;
float32, batches of 8 rows of 64 tokens; memory is counted allocation by allocation. Goals are
printed beside the figures; nothing here is asserted by a test.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from anchor import Report, Subject, adapted, peak
from keeptune import AGEM, DER, Chain, DERpp, KLBase, LwF, Method, models
from keeptune.answers import Answers, Head
from keeptune.head_pass import CrossEntropy, Term
from keeptune.methods._distil import Recorded, Teacher, TopK, record
from keeptune.methods._reference import mean_gradient
from run import five_million, interleaved

TOP_K = 64
CPU = torch.device("cpu")


class Loss:
    """The head of a model and its loss alone, on the hidden states of one batch.

    The teacher is the model itself; the student's states are a little off.
    """

    def __init__(self, subject: Subject, batch: dict[str, Tensor] | None = None) -> None:
        model, batch = subject.model, subject.batch if batch is None else batch
        with torch.no_grad():
            self.before = subject.ctx.read(batch)
        head = self.before.head
        assert head is not None
        self.labels = batch["labels"][:, 1:].flatten()
        noise = torch.randn(self.before.values.shape, generator=torch.Generator().manual_seed(0))
        spread = self.before.values.std()
        self.hidden = (self.before.values + 0.3 * spread * noise).requires_grad_()
        self.weight = model.get_output_embeddings().weight.detach().clone().requires_grad_()
        self.head = Head(self.weight, head.bias, head.scale, head.cap)
        self.kept: dict[float, Recorded] = {}

    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.weight)

    def term(self, temperature: float) -> TopK:
        if temperature not in self.kept:
            self.kept[temperature] = record(self.before, TOP_K, temperature)
        return self.kept[temperature].term(temperature, CPU)

    def done(self, loss: Tensor | None) -> None:
        assert loss is not None
        loss.backward()
        self.hidden.grad = self.weight.grad = None

    def plain(self) -> None:
        """Head and cross-entropy by autograd."""
        self.done(F.cross_entropy(self.logits(), self.labels))

    def ours(self, *terms: Term) -> Callable[[], None]:
        """Cross-entropy and these terms in one pass."""

        def run() -> None:
            answers = Answers(self.hidden, self.head)
            for term in (CrossEntropy(self.labels), *terms):
                answers.add(term, 1 / len(answers))
            self.done(answers.total())

        return run

    def full(self) -> None:
        """Cross-entropy and the KL over all entries by autograd, from full logits."""
        logits = self.logits()
        old = self.before.logits(slice(None)).log_softmax(-1)
        kl = F.kl_div(logits.log_softmax(-1), old, log_target=True, reduction="batchmean")
        self.done(F.cross_entropy(logits, self.labels) + kl)


def losses(report: Report, subject: Subject, most: float) -> None:
    """The loss alone, head included: time and memory."""
    loss, name = Loss(subject), subject.name
    forms = {
        "cross-entropy alone": loss.ours(),
        "with top-64, T = 1": loss.ours(loss.term(1.0)),
        "with top-64, T = 2": loss.ours(loss.term(2.0)),
        "with all entries": loss.ours(Teacher(loss.before, 1.0)),
        "with all entries, by autograd": loss.full,
    }
    median = interleaved({"plain": loss.plain} | forms, subject.rounds)
    limits = {"with top-64, T = 1": most, "with top-64, T = 2": most}
    for what in forms:
        ratio = median[what] / median["plain"]
        title = f"loss {what} / head and cross-entropy"
        report.add(title, name, ratio, most=limits.get(what))
    memory = peak(loss.plain)
    for what, run in forms.items():
        goal = None if "all entries" in what else 0.5
        report.add(f"memory {what} / head and cross-entropy", name, peak(run) / memory, most=goal)
    each = record(loss.before, TOP_K, 1.0).nbytes / len(loss.before)
    report.add("top-64: bytes per token", name, each, most=264.0)


def errors(report: Report, subject: Subject, tokenizer: Any) -> None:
    """The gradient of top-k KL against that of all entries, with the bucket and without.

    On text that the model can read: the source of a module of Python's own.
    """
    ids = torch.tensor(tokenizer(inspect.getsource(argparse))["input_ids"][:512]).view(8, 64)
    loss, name = Loss(subject, {"input_ids": ids, "labels": ids}), subject.name

    logits = loss.logits().detach().requires_grad_()
    places = {"logits": Answers(logits), "hidden states": Answers(loss.hidden, loss.head)}

    def gradient(term: Term, where: str) -> Tensor:
        answers = places[where]
        answers.add(term, 1 / len(answers))
        total = answers.total()
        assert total is not None
        return torch.autograd.grad(total, answers.values)[0]

    seen: list[Tensor] = []
    answers = Answers(loss.hidden.detach(), loss.head)
    answers.add(Teacher(loss.before, 1.0), 1.0, seen.append)
    answers.total()
    report.add("KL of the two models, nats", name, float(seen[0].mean()))
    want = {where: gradient(Teacher(loss.before, 1.0), where) for where in places}
    for k in (32, 64, 128):
        term = record(loss.before, k, 1.0).term(1.0, CPU)
        scaled = TopK(term.ids_, term.q / term.q.sum(1, keepdim=True), 0 * term.rest, 1.0)
        for what, form in (("bucket", term), ("renormalised", scaled)):
            for where, right in want.items():
                off = float((gradient(form, where) - right).norm() / right.norm())
                report.add(f"gradient error at {where}, top-{k}, {what}", name, off)
    kept = record(loss.before, TOP_K, 1.0)
    report.add("teacher's mass in the top-64", name, 1 - float(kept.rest.mean()))


def step_with(subject: Subject, *methods: Method, batch: dict[str, Tensor] | None = None) -> Any:
    """A whole step with methods: the seam's one pass, their gradients, the optimizer."""
    ctx, chain = subject.context(1), Chain(methods)
    given = subject.batch if batch is None else batch
    labels = given["labels"][:, 1:].flatten()
    ctx.answers_in_step = float(len(labels))

    def run() -> None:
        subject.adamw.zero_grad()
        ctx.answers = ctx.read(given)
        ctx.answers.add(CrossEntropy(labels), 1 / len(labels))
        chain.loss(ctx, given, None)
        total = ctx.answers.total()
        assert total is not None
        total.backward()
        chain.gradients(ctx)
        subject.adamw.step()

    return run


def begun(subject: Subject, *methods: Method) -> tuple[Method, ...]:
    """Methods that have a task behind them and have begun another."""
    for method in methods:
        for index in (0, 1):
            ctx = subject.context(index)
            method.begin_task(ctx)
            method.data(ctx, subject.data)
            if index == 0:
                method.end_task(ctx)
    return methods


def steps(report: Report, subject: Subject) -> None:
    """Whole steps against a plain step, which has its logits by autograd."""
    name = subject.name
    half = {key: torch.cat([v[:4], v[4:]]) for key, v in subject.batch.items()}
    forms: dict[str, tuple[Callable[[], None], float | None]] = {
        "one pass, no method": (step_with(subject), None),
        "lwf recorded": (step_with(subject, *begun(subject, LwF(targets="recorded"))), 1.05),
        "lwf online": (step_with(subject, *begun(subject, LwF())), 1.42),
        "kl_base": (step_with(subject, *begun(subject, KLBase())), None),
        "der, 8 old rows": (step_with(subject, *begun(subject, DER(rows=8))), 2.05),
        "der_pp, 8 old rows": (step_with(subject, *begun(subject, DERpp(rows=8))), 2.05),
        "replay, half of the rows old": (step_with(subject, batch=half), 1.05),
    }
    variants = {"plain": subject.step} | {what: run for what, (run, _) in forms.items()}
    median = interleaved(variants, subject.rounds)
    for what, (_, most) in forms.items():
        report.add(f"step: {what} / plain", name, median[what] / median["plain"], most=most)


class Conflict(AGEM):
    """At each step the gradient is moved, as if it always pointed apart."""

    def _weights_of(self, products: Tensor) -> list[float]:
        super()._weights_of(products)
        return [1e-3]


def reference(report: Report, subject: Subject) -> None:
    """What A-GEM costs beyond the forward and backward over its old rows, at a conflict."""
    (agem,) = begun(subject, Conflict(rows=8))
    assert isinstance(agem, AGEM)
    ctx = subject.context(1)
    words = ("dropout", "agem", "earlier tasks", ctx.step)
    kept = agem._buffers["earlier tasks"]

    def gradient() -> None:
        rows = kept.examples(kept.draw(8, ctx.random("agem", "earlier tasks", ctx.step)))
        weights = [p for p in subject.parameters if p.grad is not None]
        mean_gradient(ctx, weights, rows, *words)

    subject.forward_backward()
    variants = {"gradient": gradient, "agem": lambda: agem.gradients(ctx)}
    alone = interleaved(variants, 3 * subject.rounds)
    step = interleaved({"plain": subject.step}, subject.rounds)
    beyond = (alone["agem"] - alone["gradient"]) / step["plain"]
    report.add("agem beyond its reference gradient / plain step", subject.name, beyond, most=0.03)


def measure(report: Report, name: str, make: Callable[[], Any], rounds: int, most: float) -> None:
    losses(report, Subject(name, make(), 16, rounds), most)
    steps(report, Subject(name, make(), 16, rounds))
    lora = Subject(f"{name} LoRA", adapted(make(), "all-linear"), 16, rounds)
    steps(report, lora)
    reference(report, Subject(name, make(), 16, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="leave out SmolLM2-135M")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    given = parser.parse_args()
    report = Report()
    measure(report, "5M", five_million, rounds=7, most=1.10)
    if not given.small:
        measure(report, "SmolLM2-135M", lambda: models.load("demo").model, rounds=3, most=1.05)
        demo = models.load("demo")
        errors(report, Subject("SmolLM2-135M", demo.model, 16, 1), demo.tokenizer)
    Console(width=120).print(report.table())
    if given.markdown:
        given.markdown.write_text(report.markdown(), "utf-8")


if __name__ == "__main__":
    main()
