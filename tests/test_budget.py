"""The step between old and new weights: found, confirmed, and kept on rows not seen before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import pico
from keeptune import bisection, budget, steering, watchlog
from keeptune.budget import Between, Steps, largest_step, put, shares, snapshot
from keeptune.checks import run_checks
from keeptune.errors import RecipeError
from keeptune.intervals import paired_change
from keeptune.layers import blocks_of
from keeptune.lines import Probe
from keeptune.notebook import fit
from keeptune.recipe import parse_recipe
from keeptune.records import Example
from keeptune.runs import run
from keeptune.watchlog import Frontier, Point, Tried

Sample = Literal["search", "fresh"]


def tried(mix: float, sample: Sample, inside: bool) -> Tried:
    return Tried(mix=mix, sample=sample, points=[], inside=inside)


# -- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("edge", "found"), [(2.0, 1.0), (0.6, 0.59375), (0.3, 0.28125), (0.0, 0)])
def test_the_largest_step_inside_is_found_to_one_in_32(edge: float, found: float) -> None:
    (step,), every = largest_step(lambda mix, sample: tried(*mix, sample, mix[0] <= edge))
    assert step == pytest.approx(found, abs=1e-9)
    assert len(every) <= 1 + bisection.HALVINGS + budget.TRIES


def test_a_step_that_is_not_confirmed_goes_down_and_at_last_to_none() -> None:
    def only(edge: float) -> tuple[float, list[str]]:
        (step,), every = largest_step(
            lambda mix, sample: tried(*mix, sample, sample == "search" or mix[0] <= edge)
        )
        return step, [f"{one.mix} {one.sample}" for one in every]

    assert only(0.3) == (0.25, ["1.0 search", "1.0 fresh", "0.5 fresh", "0.25 fresh"])
    assert only(0.1)[0] == 0.0


def test_the_budget_is_kept_on_fresh_samples_in_19_of_20_runs() -> None:
    """A toy whose true loss is known: each of many answers is lost with a chance of 6 α² %."""
    allowed, kept, steps = 0.02, [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        order = rng.random((2, 400))

        def measure(steps: Steps, sample: Sample) -> Tried:
            (mix,) = steps
            lost = -(order[int(sample == "fresh")] < 0.06 * mix**2).astype(float)  # noqa: B023
            sure = 0.95 if sample == "search" else 1 - 0.05 / budget.TRIES
            found = paired_change(lost, np.ones(400), (1.0, -1.0), sure, np.random.default_rng(0))
            return tried(mix, sample, found.low >= -allowed)

        (step,), _ = largest_step(measure)
        kept.append(0.06 * step**2 <= allowed)
        steps.append(step)
    assert np.mean(kept) >= 0.95
    assert all(np.mean(kept[i : i + 20]) >= 0.95 for i in range(0, 100, 20))
    assert np.mean(steps) > 0.2  # half of what could be had, were the truth known


# -- blocks of layers -----------------------------------------------------------------------------

# What each block loses when it goes all the way, and what it learns.
COST, GAIN = (0.06, 0.0, 0.04), (0.1, 0.5, 0.4)
Floats = tuple[float, ...]


def learning(change: float) -> Point:
    """What a trial learned."""
    return Point(
        name="t", role="learning", unit="share", n=9, score=0.5, change=change, low=0, high=1,
        allowed=None, is_below=False,
    )  # fmt: skip


def by_block(
    allowed: float, *, fresh: float = 0.0, cost: Floats = COST, gain: Floats = GAIN
) -> tuple[Steps, list[Tried]]:
    """The step of three blocks whose losses and gains add up, `fresh` more lost on fresh rows."""

    def measure(steps: Steps, sample: Sample) -> Tried:
        every = steps * 3 if len(steps) == 1 else steps
        lost = sum(a * s for a, s in zip(cost, every, strict=True))
        lost += fresh * (sample == "fresh") * (len(steps) > 1)
        mix, mixes = shares(steps)
        found = tried(mix, sample, lost <= allowed)
        here = learning(sum(a * s for a, s in zip(gain, every, strict=True)))
        return found.model_copy(update={"mixes": mixes, "points": [here]})

    return largest_step(measure, blocks=3)


def test_a_block_that_loses_little_goes_further() -> None:
    steps, every = by_block(0.06)
    common = next(t.mix for t in every if t.sample == "fresh")
    assert common == pytest.approx(0.59375)
    assert steps[1] == 1.0 > steps[0]
    assert all(step >= common for step in steps)
    assert sum(a * s for a, s in zip(COST, steps, strict=True)) <= 0.06
    last = every[-1]
    assert (last.sample, last.inside, last.mixes) == ("fresh", True, list(steps))
    assert last.mix == pytest.approx(sum(steps) / 3)
    searched = [t for t in every if t.sample == "search"]
    assert len(searched) <= 4 * (1 + bisection.HALVINGS)


def test_blocks_never_do_worse_than_the_common_step() -> None:
    for allowed in (0.005, 0.02, 0.05, 0.08, 0.2):
        alone, _ = largest_step(lambda s, sample: tried(*s, sample, 0.1 * s[0] <= allowed))  # noqa: B023
        # They are not confirmed, or what they learn is less: the common step stays.
        assert by_block(allowed, fresh=1.0)[0] == alone
        assert by_block(allowed, gain=(-0.1, -0.5, -0.4))[0] == alone
        assert min(by_block(allowed)[0]) >= alone[0]


def test_a_block_may_go_where_no_common_step_may() -> None:
    steps, every = by_block(0.001, cost=(1.0, 0.0, 1.0))
    assert steps == (0.0, 1.0, 0.0)
    assert [t.sample for t in every].count("fresh") == 1
    # The whole step, or one that was not confirmed, is left alone.
    assert by_block(1.0)[0] == (1.0,)
    unsure, _ = largest_step(lambda s, sample: tried(*s[:1], sample, sample == "search"), blocks=3)
    assert unsure == (0.0,)


def test_the_budget_is_kept_with_steps_by_block_in_19_of_20_runs() -> None:
    """As the toy above: the blocks lose 4, 1 and 3 α² %, and learn 3, 4 and 3 %."""
    allowed, kept, gained = 0.02, [], []
    cost, gain = np.array([0.04, 0.01, 0.03]), np.array([0.3, 0.4, 0.3])
    for seed in range(60):
        order = np.random.default_rng(seed).random((2, 400))

        def measure(steps: Steps, sample: Sample) -> Tried:
            every = np.array(steps) * np.ones(3)
            lost = -(order[int(sample == "fresh")] < cost @ every**2).astype(float)  # noqa: B023
            sure = 0.95 if sample == "search" else 1 - 0.05 / budget.TRIES
            found = paired_change(lost, np.ones(400), (1.0, -1.0), sure, np.random.default_rng(0))
            mix, mixes = shares(steps)
            one = tried(mix, sample, found.low >= -allowed)
            return one.model_copy(update={"mixes": mixes, "points": [learning(gain @ every)]})

        alone, apart = (np.array(largest_step(measure, blocks)[0]) for blocks in (1, 3))
        kept.append(cost @ (apart * np.ones(3)) ** 2 <= allowed)
        gained.append(gain @ (apart * np.ones(3)) - gain.sum() * alone[0])
    assert np.mean(kept) >= 0.95
    assert min(gained) >= 0
    assert np.mean(gained) > 0.005


def test_layers_that_are_trained_are_divided_into_blocks() -> None:
    names = ["embed.w", *(f"layers.{i}.w" for i in (4, 5, 6, 7)), "norm.w"]
    assert blocks_of(names, 2, only_named=True) == [0, 0, 0, 1, 1, 1]
    assert blocks_of(names, 2) == [0, 1, 1, 1, 1, 1]
    assert blocks_of(names, 9, only_named=True) == [0, 0, 1, 2, 3, 3]
    assert blocks_of(["weight"], 5, only_named=True) == [0]


def test_each_block_moves_by_itself() -> None:
    model: Any = pico.causal_lm()
    weights = dict(model.named_parameters())
    old = snapshot(weights)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(1.0)
    between = Between(old, weights, 3)
    assert between.blocks == 2  # as many as it has layers
    between.move(0.25, 1.0)
    for name, weight in weights.items():
        upper = ".layers.1." in name or name.removeprefix("model.") == "norm.weight"
        upper = upper or name.startswith("lm_head")
        torch.testing.assert_close(weight.detach(), old[name] + (1.0 if upper else 0.25))


# -- the weights between --------------------------------------------------------------------------


def test_full_weights_move_in_a_straight_line_with_exact_ends() -> None:
    model = pico.causal_lm()
    weights = dict(model.named_parameters())
    old = snapshot(weights)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(torch.randn_like(weight, generator=None) * 0.1)
    new = snapshot(weights)
    between = Between(old, weights)
    for mix in (0.25, 1.0, 0.7, 0.0):
        between.move(mix)
        for name, weight in weights.items():
            wanted = old[name] + mix * (new[name] - old[name])
            torch.testing.assert_close(weight.detach(), wanted)
            if mix in (0.0, 1.0):
                assert torch.equal(weight, (new if mix else old)[name])
    assert between.cut == 0.0


def test_the_update_of_lora_moves_in_a_straight_line() -> None:
    model: Any = pico.adapted(pico.causal_lm())
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    a = next(n for n in weights if ".lora_A." in n)
    b = a.replace("lora_A", "lora_B")
    old = snapshot(weights)
    with torch.no_grad():
        for name in (n for n in weights if ".lora_B." in n):
            old[name].zero_()  # before the first task there is no update
    put_new = snapshot(weights)
    between = Between(old, weights)
    between.move(0.5)
    half = weights[b] @ weights[a]
    torch.testing.assert_close(half, 0.5 * put_new[b] @ put_new[a], atol=1e-6, rtol=1e-4)
    assert between.cut < 1e-6
    put(weights, put_new)
    assert torch.equal(weights[b], put_new[b])
    # Two updates of rank 4 have a mean of rank 8, of which the best 4 are kept.
    other = {name: torch.randn_like(value) for name, value in old.items()}
    between = Between(other, weights)
    between.move(0.5)
    wanted = 0.5 * (other[b] @ other[a] + put_new[b] @ put_new[a])
    best = torch.linalg.svdvals(wanted)[4:].norm() / wanted.norm()
    error = (weights[b] @ weights[a] - wanted).norm() / wanted.norm()
    assert float(error.detach()) == pytest.approx(float(best.detach()), rel=1e-3)
    assert between.cut >= float(best.detach()) * 0.999


# -- a whole run ----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pico.tiny_folder(tmp_path)
    for task in range(2):
        pico.write_rows(tmp_path / f"t{task}.jsonl", pico.questions(task, 16))
    # Letters that training makes less likely.
    (tmp_path / "old.txt").write_text("ZYXWVUTSRQPONMLKJIHGFEDCBAZYXWVUQWERTZUI\n" * 400)
    return tmp_path


def held(home: Path, out: str, **changes: Any) -> Any:
    return parse_recipe(pico.by_heart(home, out, "old.txt", steps=8, **changes))


def test_a_run_keeps_its_budget_and_shows_what_it_cost(home: Path) -> None:
    plain = run(held(home, "plain"))
    limit = {"old": 0.05, "past_tasks": 1000.0}
    kept = run(held(home, "kept", budget=limit, methods=[{"ewc": {"strength": 1.0}}]))
    loss = [f.matrix("guard")[:, 0] for f in (plain, kept)]
    assert loss[0][-1] / loss[0][0] > 1.05, "nothing to hold back here"
    assert (loss[1] / loss[1][0] <= 1.05).all()
    assert kept.matrix("task")[2, 1] < kept.matrix("task")[1, 1]
    found = watchlog.frontiers(kept)
    assert [f.task for f in found] == ["t0", "t1"]
    assert found[0].mix == 1.0
    assert 0 < found[1].mix < 1
    chosen = found[1].tried[-1]
    assert (chosen.sample, chosen.inside, chosen.mix) == ("fresh", True, found[1].mix)
    assert [p.name for p in chosen.points] == ["t1", "old", "past tasks, perplexity"]
    assert chosen.points[0].change > 0  # something was learned
    assert [p.name for p in found[0].tried[0].points] == ["t0", "old"]
    assert "budget" in {p.phase for p in kept.cost().phases}


def test_a_run_whose_blocks_take_steps_of_their_own(home: Path) -> None:
    """The same training, so that the step of all layers alike is found again, and then passed."""
    alike = run(held(home, "alike", budget={"old": 0.05}))
    apart = run(held(home, "apart", budget={"old": 0.05, "blocks": 2}))
    guard = apart.matrix("guard")[:, 0]
    assert (guard / guard[0] <= 1.05).all()
    one, two = (watchlog.frontiers(folder)[1] for folder in (alike, apart))
    assert 0 < one.mix < 1
    assert two.mixes is not None
    assert len(two.mixes) == 2
    assert min(two.mixes) >= one.mix
    assert two.mix > one.mix
    learned = [f.matrix("task")[2, 1] for f in (alike, apart)]
    assert learned[1] <= learned[0]


@pytest.mark.parametrize("half", [False, True])
def test_a_budget_that_cannot_be_kept_leaves_the_model_as_it_was(
    half: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the precision of training, in which all rows of the matrix are to be scored."""

    def worse(self: steering.Steering, probe: Probe) -> Sequence[Example]:
        return [e.model_copy(update={"score": e.score + 0.2}) for e in self._before(probe)]

    monkeypatch.setattr(steering.Steering, "_score", worse)
    recipe = held(home, "none", budget={"old": 0.1})
    recipe.trainer["bf16"] = half
    none = run(recipe)
    guard = none.matrix("guard")[:, 0]
    assert (guard == guard[0]).all()
    assert [f.mix for f in watchlog.frontiers(none)] == [0.0, 0.0]
    assert "after task 't0', 't1'" in {f.code: f.message for f in run_checks(none)}["KT013"]


def test_a_run_killed_while_it_looks_for_the_step_goes_on_to_the_same_end(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = {"budget": {"old": 0.05}, "checkpoint_minutes": 0}
    whole = run(held(home, "whole", **limit))
    original, calls = Between.move, []

    def die(self: Between, *mixes: float) -> None:
        calls.append(mixes)
        if len(calls) == 6:  # in the search after the second task
            raise InterruptedError
        original(self, *mixes)

    with monkeypatch.context() as patch:
        patch.setattr(Between, "move", die)
        with pytest.raises(InterruptedError):
            run(held(home, "killed", **limit))
    again = run(held(home, "killed", **limit), resume=True)
    assert [f.mix for f in watchlog.frontiers(again)] == [
        f.mix for f in watchlog.frontiers(whole)
    ]  # fmt: skip
    ends = [f.path / "state" / "task-002" / "manifest.json" for f in (again, whole)]
    assert ends[0].read_text() == ends[1].read_text()


def test_fit_takes_both_settings(tmp_path: Path) -> None:
    fitted = fit(
        pico.causal_lm(),
        {"a": (pico.questions(0, 16), pico.questions(0, 16))},
        tokenizer=pico.tokenizer(),
        guards={"old": pico.questions(7, 16)},
        out=tmp_path / "run",
        trainer={"max_steps": 2, "per_device_train_batch_size": 8},
        watch={"every": 1, "max_overhead": 1.0, "lines": {"old": 3}},
        budget={"old": 100},
    )
    assert [look.step for look in watchlog.looks(fitted.folder)] == [0, 1, 2]
    assert [f.mix for f in watchlog.frontiers(fitted.folder)] == [1.0]
    with pytest.raises(RecipeError, match="budget names 'odl'"):
        fit(
            pico.causal_lm(),
            {"a": (pico.questions(0, 16), pico.questions(0, 16))},
            tokenizer=pico.tokenizer(),
            guards={"old": pico.questions(7, 16)},
            out=tmp_path / "other",
            budget={"odl": 100},
        )


def test_a_frontier_is_read_back(home: Path, tmp_path: Path) -> None:
    one = Frontier(
        task="a", index=0, mix=0.5, cut=0.0, tried=[tried(0.5, "fresh", True)], seconds=1
    )
    assert Frontier.model_validate_json(one.model_dump_json()) == one
