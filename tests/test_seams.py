"""The seam against plain loops: the same numbers, wherever the verbs act."""

from __future__ import annotations

from typing import Any, ClassVar

import peft
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import pico
from keeptune.errors import DataError, MethodError, RecipeError, TrainingError
from keeptune.head_pass import CrossEntropy
from keeptune.method import Context, Method
from keeptune.methods.der_pp import DERpp
from keeptune.methods.eaft import EAFT
from keeptune.methods.ewc import EWC
from keeptune.methods.freeze import Freeze
from keeptune.methods.kl_base import KLBase
from keeptune.methods.label_smoothing import LabelSmoothing
from keeptune.methods.lwf import LwF
from keeptune.methods.packnet import PackNet
from keeptune.methods.wise import WiSE
from keeptune.seams import Seams
from keeptune.tokens import collate
from keeptune.trainers import build_trainer

STEPS, BATCH, CLIP, PULL = 3, 8, 0.5, 3.0


def rows(n: int = STEPS * BATCH, length: int = 10, seed: int = 0) -> Dataset:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, pico.VOCAB, (n, length), generator=g).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 4 + x[4:] for x in ids]})


def settings(tmp_path: Any, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "seed": 0,
        **more,
    }


class Pull(Method):
    """A known quadratic pull towards 0, through `gradients`."""

    def gradients(self, ctx: Context) -> None:
        for p in ctx.trainable().values():
            p.grad.add_(p.detach(), alpha=PULL * ctx.grad_scale)


class LogitMean(Method):
    """A known term, through `loss`: the mean square of the answer positions' logits."""

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    neutral: ClassVar[dict[str, Any]] = {"never": True}
    never: bool = False

    def loss(self, ctx: Context, batch: Any, outputs: Any) -> Tensor:
        squares = ctx.answer_logits(outputs.logits, batch).square().mean(-1)
        return 0.5 * ctx.mean_over_answers(squares)


class OtherLabels(Method):
    """A known term, through `ctx.answers`: half of the cross-entropy of labels that are wrong."""

    needs: ClassVar[frozenset[str]] = frozenset({"answers"})
    is_read: ClassVar[list[bool]] = []

    def loss(self, ctx: Context, batch: Any, outputs: Any) -> None:
        assert ctx.answers is not None
        self.is_read.append(ctx.answers.head is not None)
        wrong = wrong_labels(ctx.answer_labels(batch))
        ctx.answers.add(CrossEntropy(wrong), 0.5 / ctx.answers_in_step)


def wrong_labels(labels: Tensor) -> Tensor:
    return (labels + 1) % pico.VOCAB


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(*, pull: float = 0.0, term: float = 0.0, more: float = 0.0) -> Tensor:
    """The same training in plain torch."""
    model = pico.causal_lm().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    data = rows()
    for step in range(STEPS):
        chosen = data[step * BATCH : (step + 1) * BATCH]
        ids, labels = torch.tensor(chosen["input_ids"]), torch.tensor(chosen["labels"])
        logits = model(input_ids=ids).logits[:, :-1]
        keep = labels[:, 1:] != -100
        loss = F.cross_entropy(logits[keep], labels[:, 1:][keep])
        loss = loss + more * F.cross_entropy(logits[keep], wrong_labels(labels[:, 1:][keep]))
        loss = loss + term * logits[keep].square().mean()
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            p.grad.add_(p.detach(), alpha=pull)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return flat(model)


def same(got: Tensor, want: Tensor) -> bool:
    """Equal next to what the term itself does: Adam's first steps enlarge rounding."""
    return bool((got - want).norm() < 1e-3 * (want - by_hand()).norm())


def by_seams(tmp_path: Any, methods: list[Method], **more: Any) -> Tensor:
    model = pico.causal_lm()
    tokenizer = pico.tokenizer()
    trainer = build_trainer(
        "causal_lm", model, tokenizer, rows(), methods, settings(tmp_path, **more),
        collate(tokenizer),
    )  # fmt: skip
    trainer.learn("only", rows())
    return flat(model)


@pytest.mark.parametrize("cut", [1, 4])
def test_gradients_act_once_per_step_before_clipping(tmp_path: Any, cut: int) -> None:
    more = {"per_device_train_batch_size": BATCH // cut, "gradient_accumulation_steps": cut}
    got = by_seams(tmp_path, [Pull()], **more)
    assert same(got, by_hand(pull=PULL))


@pytest.mark.parametrize("cut", [1, 4])
def test_a_loss_term_weighs_the_same_in_any_number_of_micro_batches(
    tmp_path: Any, cut: int
) -> None:
    more = {"per_device_train_batch_size": BATCH // cut, "gradient_accumulation_steps": cut}
    got = by_seams(tmp_path, [LogitMean()], **more)
    assert same(got, by_hand(term=0.5))


@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize("beside_logits", [False, True])
def test_a_term_on_answers_and_the_loss_are_one_pass(
    tmp_path: Any, cut: int, beside_logits: bool
) -> None:
    more = {"per_device_train_batch_size": BATCH // cut, "gradient_accumulation_steps": cut}
    OtherLabels.is_read.clear()
    methods: list[Method] = [OtherLabels()]
    if beside_logits:  # then from the same logits, beside the model's own loss
        methods.append(LogitMean())
    got = by_seams(tmp_path, methods, **more)
    assert same(got, by_hand(more=0.5, term=0.5 * beside_logits))
    assert set(OtherLabels.is_read) == {not beside_logits}


def test_label_smoothing_and_eaft_compose_with_distillation(tmp_path: Any) -> None:
    each = [LabelSmoothing(), EAFT(mask=0.3), LwF(targets="recorded"), DERpp(), KLBase()]
    model, tokenizer = pico.causal_lm(), pico.tokenizer()
    trainer = build_trainer(
        "causal_lm", model, tokenizer, rows(), each, settings(tmp_path), collate(tokenizer)
    )
    for seed in (0, 1):
        trainer.learn(f"t{seed}", rows(seed=seed))
    for method in each:
        assert method.evidence()[method.proof] > 0, method.name()


class Counts(Method):
    """Writes down how many steps there are, at each step."""

    def after_step(self, ctx: Context) -> None:
        self._evidence.setdefault("steps", []).append((ctx.step + 1, ctx.steps))


def test_a_method_knows_how_many_steps_a_task_has(tmp_path: Any) -> None:
    method = Counts()
    by_seams(tmp_path, [method], gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=2)
    assert method.evidence()["steps"] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_no_method_is_trls_own_training(tmp_path: Any) -> None:
    model = pico.causal_lm()
    arguments = SFTConfig(
        **settings(tmp_path), report_to="none", save_strategy="no", disable_tqdm=True, bf16=False,
        activation_checkpointing=False, max_length=None, dataloader_pin_memory=False,
        logging_nan_inf_filter=False,
    )  # fmt: skip
    tokenizer = pico.tokenizer()
    trainer = SFTTrainer(
        model, arguments, train_dataset=rows(), processing_class=tokenizer,
        data_collator=collate(tokenizer),
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.train()
    assert torch.equal(flat(model), by_seams(tmp_path, []))


class Own(Seams, SFTTrainer):
    """What a user writes who has a trainer already."""


def own_trainer(tmp_path: Any, methods: list[Method], **more: Any) -> Own:
    arguments = SFTConfig(
        **settings(tmp_path, **more), report_to="none", disable_tqdm=True, bf16=False,
        activation_checkpointing=False, max_length=None, dataloader_pin_memory=False,
    )  # fmt: skip
    return Own(
        pico.causal_lm(), arguments, train_dataset=rows(), processing_class=pico.tokenizer(),
        methods=methods,
    )  # fmt: skip


def test_a_users_own_trainer_learns_task_after_task(tmp_path: Any) -> None:
    ewc, lwf = EWC(strength=10.0), LwF()
    trainer = own_trainer(tmp_path, [ewc, lwf], save_strategy="no")
    trainer.train()
    trainer.learn("second", rows(seed=1))
    assert trainer.tasks_learned == 2
    assert ewc.evidence()["gradient_share"] > 0
    assert lwf.evidence()["kl"] > 0


def test_a_users_own_trainer_resumes_with_the_methods_state(tmp_path: Any) -> None:
    whole = own_trainer(tmp_path / "whole", [EWC(), LwF()], save_strategy="no")
    whole.train()
    cut = own_trainer(tmp_path / "cut", [EWC(), LwF()], save_strategy="steps", save_steps=1)
    cut.train()
    again = own_trainer(tmp_path / "cut", [EWC(), LwF()], save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-1"))
    assert torch.equal(flat(again.model), flat(whole.model))
    kept = [list(t.strategy)[1].evidence() for t in (whole, again)]
    assert kept[0] == kept[1]


class Columns(Method):
    """Which columns a method finds, and which go on to the trainer."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        self._evidence |= {"own": ctx.dataset.column_names, "trained": dataset.column_names}
        return dataset


def test_the_choices_of_rows_are_for_methods_only(tmp_path: Any) -> None:
    plain = rows()
    options = [[{"input_ids": [7], "labels": [7]}] * 2] * len(plain)
    with_choices = plain.add_column("options", options)
    method = Columns()
    trainer = build_trainer(
        "causal_lm", pico.causal_lm(), pico.tokenizer(), with_choices, [method],
        settings(tmp_path), collate(pico.tokenizer()),
    )  # fmt: skip
    for dataset in (with_choices, plain, with_choices):
        trainer.learn("any", dataset)
        evidence = {"own": dataset.column_names, "trained": plain.column_names}
        assert method.evidence() == evidence


def test_untokenised_rows_are_refused(tmp_path: Any) -> None:
    trainer = own_trainer(tmp_path, [])
    with pytest.raises(DataError, match=r"no column 'input_ids'.*keeptune\.tokenise"):
        trainer.learn("raw", Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}))


def test_a_method_that_needs_logits_refuses_another_loss(tmp_path: Any) -> None:
    with pytest.raises(MethodError, match="'lwf' needs the model's logits"):
        own_trainer(tmp_path, [LwF()], loss_type="dft")


def test_a_loss_that_is_not_a_number_stops_at_once(tmp_path: Any) -> None:
    class Broken(Method):
        def after_step(self, ctx: Context) -> None:
            with torch.no_grad():
                next(iter(ctx.trainable().values())).fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"became nan in task 'only' at step 2\."):
        by_seams(tmp_path, [Broken()])


def test_fp16_gradients_are_edited_at_their_scale(tmp_path: Any) -> None:
    model, tokenizer = pico.causal_lm(), pico.tokenizer()
    trainer = build_trainer(
        "causal_lm", model, tokenizer, rows(), [Pull()], settings(tmp_path), collate(tokenizer)
    )
    # A CPU has no fp16 training; its scaler works on any device and must change nothing.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    try:
        trainer.learn("only", rows())
    finally:
        trainer.accelerator.state._reset_state(reset_partial_state=True)
    assert same(flat(model), by_hand(pull=PULL))


def test_each_task_begins_with_the_same_loss_scale(tmp_path: Any) -> None:
    """So that a run resumed between two tasks goes on as one that was never stopped."""
    trainer = own_trainer(tmp_path, [], save_strategy="no")
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    trainer.add_callback(Noted(lambda: scales.append(scaler.get_scale())))
    for task in "ab":
        trainer.learn(task, rows())
        scaler.update(8.0)
    assert scales == [1024.0, 1024.0]


class Noted(TrainerCallback):  # type: ignore[misc]
    """Calls a function when training begins."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.call()


def test_several_gpus_of_one_process_are_refused(tmp_path: Any) -> None:
    arguments = TrainingArguments(**settings(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 2
    with pytest.raises(RecipeError, match=r"sees 2 GPUs.*torchrun --nproc_per_node 2"):
        Plain(pico.causal_lm(), arguments, train_dataset=rows(), methods=[])


class Plain(Seams, Trainer):
    """Another trainer of a user's own."""


def test_what_a_tasks_end_does_has_the_optimizers_memory(tmp_path: Any) -> None:
    trainer = own_trainer(tmp_path, [], save_strategy="no")
    trainer.learn("a", rows())
    assert trainer.optimizer is None
    assert not trainer.accelerator._optimizers


def test_recomputing_layers_differentiates_no_frozen_one(tmp_path: Any) -> None:
    ends, wanted = [], []
    for again in (False, True):
        model, tokenizer = pico.causal_lm(), pico.tokenizer()
        kept = model.model.layers[0].register_forward_pre_hook(
            lambda module, args: wanted.append(args[0].requires_grad)
        )
        trainer = build_trainer(
            "causal_lm", model, tokenizer, rows(), [Freeze(layers=1)],
            {**settings(tmp_path), "activation_checkpointing": again}, collate(tokenizer),
        )  # fmt: skip
        trainer.learn("a", rows())
        kept.remove()
        ends.append(flat(model))
    assert torch.equal(*ends)
    assert not any(wanted)


def test_a_name_is_learned_once_where_each_task_has_its_own_part(tmp_path: Any) -> None:
    trainer = own_trainer(tmp_path, [PackNet()], max_steps=1)
    trainer.learn("a", rows())
    with pytest.raises(DataError, match="A task 'a' was learned before, and packnet keeps"):
        trainer.learn("a", rows())
    trainer.learn("b", rows())
    trainer = own_trainer(tmp_path, [EWC(strength=1.0)], max_steps=1)
    trainer.learn("a", rows())
    trainer.learn("a", rows())


def test_recomputing_that_takes_no_second_gradient_is_refused(tmp_path: Any) -> None:
    again = {"activation_checkpointing": True}
    again |= {"activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RecipeError, match="use_reentrant"):
        build_trainer(
            "causal_lm", pico.causal_lm(), pico.tokenizer(), rows(), [],
            settings(tmp_path) | again, collate(pico.tokenizer()),
        )  # fmt: skip


@pytest.mark.parametrize("bert", [True, False])
def test_a_classifiers_loss_does_not_depend_on_how_a_step_is_divided(
    tmp_path: Any, bert: bool
) -> None:
    data = rows()
    labelled = Dataset.from_dict(
        {"input_ids": data["input_ids"], "labels": [0, 1] * (BATCH * 3 // 2)}
    )
    ends = []
    for size, accumulated in ((BATCH, 1), (BATCH // 2, 2)):
        model, tokenizer = pico.classifier(bert=bert), pico.tokenizer()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        own = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer = build_trainer(
            "classification", model, tokenizer, labelled, [LwF(), Freeze(layers=0)],
            {**settings(tmp_path), **own, "optim": "sgd", "max_grad_norm": 0.0}, collate(tokenizer),
        )  # fmt: skip
        trainer.learn("a", labelled)
        trainer.learn("b", labelled)
        ends.append(flat(model))
    torch.testing.assert_close(*ends, atol=1e-6, rtol=1e-4)


def test_classifiers_train_through_the_same_seam(tmp_path: Any) -> None:
    tokenizer = pico.tokenizer()
    data = rows()
    labelled = Dataset.from_dict(
        {"input_ids": data["input_ids"], "labels": [0, 1] * (BATCH * 3 // 2)}
    )
    ewc, lwf = EWC(strength=10.0), LwF()
    trainer = build_trainer(
        "classification", pico.classifier(), tokenizer, labelled, [ewc, lwf],
        settings(tmp_path), collate(tokenizer),
    )  # fmt: skip
    assert isinstance(trainer, Trainer)
    assert isinstance(trainer.args, TrainingArguments)
    trainer.learn("a", labelled)
    trainer.learn("b", labelled)
    assert ewc.evidence()["gradient_share"] > 0
    assert lwf.evidence()["kl"] > 0


# peft 0.21 asks transformers 5 by a name that transformers is about to retire.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_preference_trainer_runs_what_needs_no_labels(tmp_path: Any) -> None:
    class OwnDPO(Seams, DPOTrainer):
        """Another trainer of TRL's."""

    pairs = [{"prompt": f"p{i}:", "chosen": " a", "rejected": " b"} for i in range(8)]
    arguments = DPOConfig(
        **settings(tmp_path), report_to="none", save_strategy="no", disable_tqdm=True, bf16=False,
        activation_checkpointing=False, dataloader_pin_memory=False,
    )  # fmt: skip

    def trainer(methods: list[Method]) -> Any:
        # With an adapter the base model is the reference; else DPO would load a second model.
        model = pico.adapted(pico.causal_lm(), peft.LoraConfig(target_modules="all-linear"))
        return OwnDPO(
            model, args=arguments, train_dataset=Dataset.from_list(pairs), methods=methods,
            processing_class=pico.tokenizer(),
        )  # fmt: skip

    wise = WiSE(mix=0.5)
    learner = trainer([wise])
    model = learner.model
    before = flat(model)
    learner.train()
    assert not torch.equal(flat(model), before)
    assert wise.evidence()["moved_back"] > 0
    with pytest.raises(MethodError, match="'lwf' needs the model's logits"):
        trainer([LwF()])
