"""One adapter per task: which is trained, which is served, and that old ones never change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from torch import Tensor

import pico
from keeptune.errors import MethodError
from keeptune.methods._adapters import adapter_hash
from keeptune.methods._questions import Router, hidden, question
from keeptune.methods.task_lora import TaskLoRA
from keeptune.tokens import collate
from keeptune.trainers import build_trainer
from pencil import context, learn, texts

IDS = torch.tensor([[6, 7, 8, 9, 10]])


@torch.no_grad()
def answers(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.clone()


def stream(tasks: int) -> tuple[Any, TaskLoRA, list[Tensor]]:
    """A model that has learned some tasks, and its answers right after each."""
    model, method, after = pico.adapted(pico.causal_lm(16)), TaskLoRA(), []
    for index in range(tasks):
        learn(model, method, index)
        after.append(answers(model))
    return model, method, after


def test_a_new_task_trains_its_own_adapter_only() -> None:
    model, method, _ = stream(2)
    ctx = context(model, task="t2", index=2)
    method.begin_task(ctx)
    assert ctx.trainable()
    assert all(".task_002." in name for name in ctx.trainable())


def test_a_new_adapter_starts_without_effect() -> None:
    model, method = pico.adapted(pico.causal_lm(16)), TaskLoRA()
    with model.disable_adapter():
        base = answers(model)
    method.begin_task(context(model))
    assert torch.equal(answers(model), base)


def test_a_new_adapter_depends_on_seed_and_task_alone() -> None:
    hashes = []
    for noise, seed in ((1, 0), (2, 0), (1, 1)):
        model = pico.adapted(pico.causal_lm(16))
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        TaskLoRA().begin_task(context(model, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        hashes.append(adapter_hash(model, "task_000"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_every_task_is_answered_as_right_after_it_was_learned() -> None:
    model, method, after = stream(3)
    for index in (0, 2, 1):
        method.serve(context(model), f"t{index}")
        assert torch.equal(answers(model), after[index])
    assert not torch.equal(after[0], after[1])


def updates(model: Any, adapter: str) -> dict[str, Tensor]:
    return {
        name: layer.get_delta_weight(adapter).detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def test_an_unknown_task_is_answered_by_the_exact_mean_of_all_updates() -> None:
    model, method, _ = stream(3)
    parts = [updates(model, f"task_{index:03d}") for index in range(3)]
    method.serve(context(model), None)
    assert model.active_adapter == "merged"
    for name, update in updates(model, "merged").items():
        mean = (parts[0][name] + parts[1][name] + parts[2][name]) / 3
        torch.testing.assert_close(update, mean, atol=1e-5, rtol=1e-5)


def test_a_name_never_learned_is_an_unknown_task() -> None:
    model, method, _ = stream(2)
    method.serve(context(model), None)
    mean = answers(model)
    method.serve(context(model), "never seen")
    assert torch.equal(answers(model), mean)


def test_before_any_task_the_first_adapter_answers() -> None:
    model = pico.adapted(pico.causal_lm(16))
    before = answers(model)
    TaskLoRA().serve(context(model), None)
    assert torch.equal(answers(model), before)


def test_serving_leaves_every_adapter_as_it_was() -> None:
    model, method, _ = stream(3)
    names = [f"task_{index:03d}" for index in range(3)]
    before = [adapter_hash(model, name) for name in names]
    for task in (None, "t0", None, "t2"):
        method.serve(context(model), task)
    assert [adapter_hash(model, name) for name in names] == before
    learn(model, method, 3)
    assert set(model.peft_config) == {"default", *names, "task_003"}


def test_evidence_counts_the_adapters_that_stayed() -> None:
    _, method, _ = stream(3)
    assert method.evidence() == {"adapters": 3, "identical": 2}


def test_an_adapter_edited_while_another_task_is_learned_is_found() -> None:
    model, method, _ = stream(2)
    ctx = context(model, task="t2", index=2)
    method.begin_task(ctx)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".task_001." in n).view(-1)[0] += 1e-3
    with pytest.raises(MethodError, match="adapter of task 't1' changed while 't2'"):
        method.end_task(ctx)


def test_the_hash_sees_one_changed_bit() -> None:
    model = pico.adapted(pico.causal_lm(16))
    before = adapter_hash(model, "default")
    assert adapter_hash(model, "default") == before
    with torch.no_grad():
        weight = next(p for n, p in model.named_parameters() if ".default." in n).view(-1)
        weight[:1] = torch.nextafter(weight[:1], torch.tensor(9.0))
    assert adapter_hash(model, "default") != before


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: pico.causal_lm(16), "all weights are trained here"),
        (
            lambda: pico.adapted(pico.causal_lm(16), IA3Config(task_type="CAUSAL_LM")),
            "another kind of adapter is trained here",
        ),
    ],
)
def test_a_model_without_lora_is_refused_before_anything_runs(
    model: Any, words: str, tmp_path: Any
) -> None:
    tokenizer = pico.tokenizer()
    settings = {"output_dir": str(tmp_path), "seed": 0}
    with pytest.raises(MethodError, match=f"'task_lora' needs a LoRA adapter, but {words}"):
        build_trainer(
            "causal_lm", model(), tokenizer, texts([6, 7]), [TaskLoRA()], settings,
            collate(tokenizer),
        )  # fmt: skip


# -- tasks that are not told ----------------------------------------------------------------------


def test_a_question_goes_to_the_nearest_mean_by_hand() -> None:
    router = Router("nearest")
    router.learn(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))  # mean (1, 0)
    router.learn(torch.tensor([[0.0, 4.0], [2.0, 4.0]]))  # mean (1, 4)
    assert router.choose(torch.tensor([[9.0, 1.9], [-9.0, 2.1]])) == [0, 1]


def test_the_classifier_looks_past_directions_in_which_tasks_vary() -> None:
    # Both vary by 10 in x and by 0.1 in y; the means differ by 2 in x and by 1 in y.
    router, near = Router("classifier"), Router("nearest")
    for middle in ([0.0, 0.0], [2.0, 1.0]):
        apart = torch.tensor([[10.0, 0.0], [-10.0, 0.0], [0.0, 0.1], [0.0, -0.1]])
        router.learn(torch.tensor(middle) + apart)
        near.learn(torch.tensor(middle) + apart)
    asked = torch.tensor([[2.0, 0.1], [0.0, 0.9]])
    assert router.choose(asked) == [0, 1]
    assert near.choose(asked) == [1, 0]


def test_the_classifier_is_linear_discriminant_analysis() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(30, 4, generator=g) @ torch.randn(4, 4, generator=g) + i for i in range(3)]
    router = Router("classifier")
    for part in parts:
        router.learn(part)
    asked = 2 * torch.randn(200, 4, generator=g) + 1
    within = sum((p - p.mean(0)).T @ (p - p.mean(0)) for p in parts) / 87
    shrunk = 0.9 * within + 0.1 * within.trace() / 4 * torch.eye(4)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3)
    oracle.fit(torch.cat(parts).numpy(), [i for i in range(3) for _ in range(30)])
    means = torch.stack([p.mean(0) for p in parts])
    coefficients = torch.linalg.solve(shrunk, means.T)
    # Its own covariance is put in place of the library's, which divides by n and does not shrink.
    oracle.coef_ = coefficients.T.numpy()
    oracle.intercept_ = -(means.T * coefficients).sum(0).numpy() / 2
    assert router.choose(asked) == oracle.predict(asked.numpy()).tolist()


def test_a_question_ends_where_its_answer_begins() -> None:
    assert question({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}) == [5, 6]
    assert question({"input_ids": [5, 6], "labels": 3}) == [5, 6]
    assert question({"input_ids": [5, 6], "labels": [5, 6]}) == [5, 6]


def test_hidden_states_are_the_base_models_and_do_not_depend_on_the_batch() -> None:
    model = pico.adapted(pico.causal_lm(16))
    ctx, asked = context(model), [[6, 7, 8], [9], [10, 11, 12, 13, 14]]
    with torch.no_grad(), model.disable_adapter():
        states = [
            model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            for ids in asked
        ]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for at, pick in (("last", lambda s: s[-1]), ("mean", lambda s: s.mean(0))):
        got = hidden(ctx, asked, at)  # type: ignore[arg-type]
        torch.testing.assert_close(got, torch.stack([pick(s) for s in states]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert model.active_adapters == ["default"]


def routed(kind: str) -> tuple[Any, TaskLoRA]:
    """A model that has learned two tasks whose questions have other words."""
    model, method = pico.adapted(pico.causal_lm(32)), TaskLoRA(unknown=kind)
    for index, words in enumerate(([6, 7, 8, 9], [20, 21, 22, 23])):
        rows = texts(*[[a, b, 30, 31] for a in words for b in words], answer_from=2)
        ctx = context(model, rows, task=f"t{index}", index=index)
        method.begin_task(ctx)
        method.end_task(ctx)
        assert method.evidence()["own_questions_known"] == 1.0
    return model, method


@pytest.mark.parametrize("kind", ["nearest", "classifier"])
def test_new_questions_are_sent_to_their_task(kind: str) -> None:
    model, method = routed(kind)
    asked = [[6, 9, 7], [21, 23], [8, 8, 8, 6], [22, 20, 20]]
    assert method.route(context(model), asked) == ["t0", "t1", "t0", "t1"]
    kept = method.state()
    again = TaskLoRA(unknown=kind)
    again.restore(context(model), kept)
    assert again.route(context(model), asked) == ["t0", "t1", "t0", "t1"]
    size = 32 * 2 if kind == "nearest" else 32 * 2 + 32 * 32
    assert method.declared_bytes(context(model)) == 4 * size
    assert sum(t.nbytes for t in kept.tensors.values()) == 4 * size


def test_nothing_is_chosen_among_fewer_than_two_or_by_merge() -> None:
    model, method = routed("nearest")
    assert TaskLoRA().route(context(model), [[6]]) is None
    assert TaskLoRA(unknown="nearest").route(context(model), [[6]]) is None
    method._adapters.popitem()
    assert method.route(context(model), [[6]]) is None


def test_the_mean_of_rank_stabilised_adapters_is_their_mean() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_rslora=True)
    model: Any = pico.adapted(pico.causal_lm(16), config)
    method, updates = TaskLoRA(), []
    for index in range(3):
        learn(model, method, index)
        updates.append(delta(model, f"task_{index:03d}"))
    method.serve(context(model), None)
    torch.testing.assert_close(delta(model, "merged"), sum(updates) / 3)


def delta(model: Any, adapter: str) -> Tensor:
    """What an adapter adds to one matrix."""
    part = model.get_base_model().model.layers[0].mlp.up_proj
    return part.get_delta_weight(adapter).detach().clone()


def test_what_has_no_mean_is_refused_before_anything_is_learned() -> None:
    heads = pico.adapted(
        pico.classifier(), LoraConfig(task_type="SEQ_CLS", target_modules=["v_proj"])
    )
    with pytest.raises(MethodError, match=r"a head, or other whole modules.*`unknown: nearest`"):
        TaskLoRA().begin_task(context(heads))
    TaskLoRA(unknown="nearest").begin_task(context(heads))
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], use_dora=True)
    with pytest.raises(MethodError, match="DoRA"):
        TaskLoRA().begin_task(context(pico.adapted(pico.causal_lm(), config)))
