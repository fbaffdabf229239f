"""GEM: the small quadratic program by hand and by brute force, and a reference for each task."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from keeptune.methods.agem import share_to_add
from keeptune.methods.gem import GEM, nonnegative_minimum, shares_to_add
from pencil import Softmax, context, examples


def products(*vectors: list[float]) -> Tensor:
    stacked = torch.tensor(vectors, dtype=torch.float64)
    return stacked @ stacked.T


def by_brute_force(p: Tensor, q: Tensor) -> Tensor:
    """The best of all choices of which numbers are 0."""
    best, lowest = torch.zeros_like(q), 0.0
    for chosen in itertools.product([False, True], repeat=len(q)):
        free = torch.tensor(chosen)
        u = torch.zeros_like(q)
        if free.any():
            u[free] = torch.linalg.lstsq(p[free][:, free], -q[free]).solution
        value = float(0.5 * u @ p @ u + q @ u)
        if (u >= 0).all() and value < lowest:
            best, lowest = u, value
    return best


def test_a_program_of_one_number_by_hand() -> None:
    p = torch.tensor([[4.0]], dtype=torch.float64)
    for q, want in ((-2.0, 0.5), (2.0, 0.0)):
        got = nonnegative_minimum(p, torch.tensor([q], dtype=torch.float64))
        assert got.item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_the_program_is_solved_exactly(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    k = 1 + seed % 6
    vectors = torch.randn(k, 8, generator=g, dtype=torch.float64)
    # References of very different sizes, as tasks with small and large losses give them.
    vectors *= 10.0 ** torch.randint(-4, 3, (k, 1), generator=g)
    q = vectors @ torch.randn(8, generator=g, dtype=torch.float64)
    p = vectors @ vectors.T
    torch.testing.assert_close(nonnegative_minimum(p, q), by_brute_force(p, q), rtol=1e-5, atol=0)


def test_references_that_are_equal_or_nothing_do_no_harm() -> None:
    g, same, none = [-1.0, 1.0], [1.0, 0.0], [0.0, 0.0]
    got = shares_to_add(products(g, same, same, none), 0.0)
    assert got.isfinite().all()
    assert got[:2].sum().item() == pytest.approx(1.0, rel=1e-6)
    assert got[2] == 0


def test_with_one_task_and_no_margin_it_is_agem() -> None:
    found = products([1.0, -2.0, 0.5], [0.5, 1.0, 0.0])
    want = share_to_add(found[0, 1].item(), found[1, 1].item())
    assert shares_to_add(found, 0.0).item() == pytest.approx(want, rel=1e-8)


def test_two_constraints_by_hand() -> None:
    # g points against both axes: the nearest gradient against neither is 0.
    got = shares_to_add(products([-1.0, -2.0], [1.0, 0.0], [0.0, 1.0]), 0.0)
    assert got.tolist() == pytest.approx([1.0, 2.0])


def test_the_projected_gradient_is_the_nearest_that_helps_every_task() -> None:
    g = torch.Generator().manual_seed(3)
    step = torch.randn(20, generator=g, dtype=torch.float64)
    references = torch.randn(4, 20, generator=g, dtype=torch.float64)
    stacked = torch.cat([step[None], references])
    shares = shares_to_add(stacked @ stacked.T, 0.0)
    projected = step + shares @ references
    dots = references @ projected
    assert (references @ step < 0).any()
    assert (dots > -1e-6).all()
    assert (shares * dots).abs().max() < 1e-6  # only what binds has a share


def test_in_a_conflict_every_share_is_at_least_the_margin() -> None:
    found = products([-1.0, 3.0], [1.0, 0.0], [0.0, 1.0])
    assert shares_to_add(found, 0.5).tolist() == pytest.approx([1.0, 0.5])
    assert shares_to_add(found, 2.0).tolist() == pytest.approx([2.0, 2.0])
    assert shares_to_add(products([1.0, 3.0], [1.0, 0.0], [0.0, 1.0]), 0.5).tolist() == [0, 0]


def test_the_scale_of_fp16_gradients_drops_out() -> None:
    found = products([-1.0, 0.5, 1.0], [1.0, 0.3, 0.0], [0.0, 1.0, 0.2])
    torch.testing.assert_close(shares_to_add(found, 0.5), shares_to_add(found * 2.0**32, 0.5))


def test_products_that_overflowed_leave_the_step_out() -> None:
    found = products([-1.0], [1.0])
    found[0, 1] = torch.inf
    assert shares_to_add(found, 0.5).isnan().all()


def test_each_earlier_task_has_a_buffer_and_a_reference() -> None:
    model, method = Softmax([[0.0, 0.0], [0.0, 0.0]]), GEM(rows=4, size=3, margin=0.0)
    for index, rows in enumerate((examples(*[(0, 0)] * 5), examples(*[(1, 0)] * 5))):
        method.end_task(context(model, rows, task=f"t{index}", index=index))
    ctx = context(model, examples((0, 1), (1, 0)), index=2)
    batch = ctx.batch(list(ctx.dataset))
    F.cross_entropy(model(batch["input_ids"]).logits, batch["labels"]).backward()
    method.gradients(ctx)
    # The first word's rows conflict and lose all of their gradient, the second's agree.
    assert torch.allclose(
        model.weight.grad, torch.tensor([[0.0, 0.0], [-0.25, 0.25]], dtype=torch.float64)
    )
    shown = method.evidence()
    assert shown["angles"] == pytest.approx({"t0": 135, "t1": 45})
    assert shown["reference_rows"] == 6
    assert shown["rows_kept"] == 6


def test_a_buffer_comes_back_under_its_tasks_name() -> None:
    model, method, again = Softmax([[0.0, 0.0]]), GEM(size=3), GEM(size=3)
    for task in ("a/b", "c"):
        method.end_task(context(model, examples((0, 0), (0, 1)), task=task))
    ctx = context(model)
    again.restore(ctx, method.state())
    assert again.state().values == method.state().values
    assert list(again.state().values["buffers"]) == ["a/b", "c"]
    assert again.declared_bytes(ctx) == method.declared_bytes(ctx) > 0
