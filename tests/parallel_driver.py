"""Two tasks with one strategy, on one process or several; `test_parallel` compares them.

Run as `python parallel_driver.py RANK MEETING FOLDER`, once for each of two processes.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from pydantic import PrivateAttr
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from transformers import Trainer

import pico
from keeptune.errors import MethodError
from keeptune.method import Batch, Context, Method, State
from keeptune.methods._anchor.shards import Spec, local, part, spec_of, sum_over_shards, whole
from keeptune.methods.adapters import Adapters
from keeptune.methods.agem import AGEM
from keeptune.methods.der import DER
from keeptune.methods.der_pp import DERpp
from keeptune.methods.eaft import EAFT
from keeptune.methods.ema import EMA
from keeptune.methods.ewc import EWC
from keeptune.methods.feature_replay import FeatureReplay
from keeptune.methods.freeze import Freeze
from keeptune.methods.gem import GEM
from keeptune.methods.half import Half
from keeptune.methods.hierarchical import Hierarchical
from keeptune.methods.ilora import ILoRA
from keeptune.methods.inc_lora import IncLoRA
from keeptune.methods.joint import Joint
from keeptune.methods.kl_base import KLBase
from keeptune.methods.l2sp import L2SP
from keeptune.methods.label_smoothing import LabelSmoothing
from keeptune.methods.lwf import LwF
from keeptune.methods.mas import MAS
from keeptune.methods.merge import Merge
from keeptune.methods.mixture import Mixture
from keeptune.methods.olora import OLoRA
from keeptune.methods.osf import OSF
from keeptune.methods.packnet import PackNet
from keeptune.methods.progressive import Progressive
from keeptune.methods.progressive_prompts import ProgressivePrompts
from keeptune.methods.prompt import PromptTuning
from keeptune.methods.pseudo_replay import PseudoReplay
from keeptune.methods.replay import Replay
from keeptune.methods.retrieval import Retrieval
from keeptune.methods.self_rewrite import SelfRewrite
from keeptune.methods.seq_star import SeqStar
from keeptune.methods.si import SI
from keeptune.methods.task_lora import TaskLoRA
from keeptune.methods.wise import WiSE
from keeptune.tokens import collate
from keeptune.trainers import ClassifierTrainer, TextTrainer, build_trainer

PROCESSES, BATCH, STEPS, RATE = 2, 8, 4, 1e-2
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """A way to train that must not change the numbers; each step sees the same rows everywhere.

    Attributes:
        processes: How many share the work.
        cut: Micro batches of a step in each process.
        settings: Of the trainer.
        near: The weights may differ from plain training on one process by this share of what the
            methods do to them in two tasks; for no methods, of what training does.
        kept: What methods keep may differ by this share of its norm.
    """

    processes: int = 1
    cut: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    near: float = 1e-4
    kept: float = 1e-4


FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
PLACES = {
    "single": Place(),
    "accumulated": Place(cut=4),
    "checkpointed": Place(settings={"activation_checkpointing": True}),
    # Each product of a forward or backward pass is up to 1/256 off.
    "bf16": Place(settings={"bf16": True}, near=0.1, kept=0.3),
    "ddp": Place(PROCESSES, 2),
    "fsdp": Place(PROCESSES, 2, FSDP),
}
EVERYWHERE = tuple(PLACES)[1:]
# ΔW = BA needs whole factors.
WHOLE = tuple(name for name in EVERYWHERE if name != "fsdp")


class Backwards(Method):
    """Has the rows that others add trained on first; there are no steps for all."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        return dataset.select(range(len(dataset) - 1, -1, -1))


class Spring(Method):
    """A pull towards the weights before the task, and a shrinking by the learning rate, on shards.

    It asks the seam for all that a method may rely on: weights of one kind from `begin_task` on,
    gradients once a step, and the learning rate of each step.
    """

    _anchor: Tensors = PrivateAttr(default_factory=dict)
    _specs: dict[str, Spec | None] = PrivateAttr(default_factory=dict)

    def begin_task(self, ctx: Context) -> None:
        with torch.no_grad():
            self._anchor = {n: local(p).detach().clone() for n, p in ctx.trainable().items()}
        self._specs = {n: spec_of(p) for n, p in ctx.trainable().items()}
        self._evidence["rates"] = []

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        weights = ctx.trainable()
        assert {n: spec_of(p) for n, p in weights.items()} == self._specs
        squares = 0.0
        for name, weight in weights.items():
            assert weight.grad is not None
            pull = local(weight) - self._anchor[name]
            squares += sum_over_shards(pull.square().sum(), weight).item()
            local(weight.grad).add_(pull, alpha=ctx.grad_scale)
        self._evidence["distance"] = squares

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        self._evidence["rates"].append(ctx.learning_rate)
        for weight in ctx.trainable().values():
            local(weight).mul_(1 - ctx.learning_rate)

    def state(self) -> State:
        return State({f"anchor/{n}": whole(t, self._specs[n]) for n, t in self._anchor.items()})

    def restore(self, ctx: Context, state: State) -> None:
        weights = ctx.trainable()
        self._anchor = {n: part(state.tensors[f"anchor/{n}"], p) for n, p in weights.items()}


class Smooth(Method):
    """A known term through `loss`: the mean square of the answer positions' logits."""

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor:
        squares = ctx.answer_logits(outputs.logits, batch).square().mean(-1)
        return 2.0 * ctx.mean_over_answers(squares)


@dataclass(frozen=True)
class Case:
    """One strategy, on all weights or on a LoRA adapter.

    Attributes:
        methods: Makes it anew.
        lora: Whether only an adapter is trained.
        classes: Of a classifier, each task having its share of them; 0 for a language model.
        places: Where it is compared with "single".
    """

    methods: Callable[[], list[Method]] = list
    lora: bool = False
    classes: int = 0
    places: tuple[str, ...] = EVERYWHERE


# To compare a new method, add a line.
CASES = {
    "plain": Case(),
    "plain, LoRA": Case(lora=True),
    "spring": Case(lambda: [Spring()]),
    "spring, LoRA": Case(lambda: [Spring()], lora=True),
    "smooth + replay": Case(lambda: [Smooth(), Replay(), Backwards()]),
    "task_lora": Case(lambda: [TaskLoRA()], lora=True, places=("ddp",)),
    "half": Case(lambda: [Half()], places=WHOLE),
    "freeze, cached": Case(lambda: [Freeze(cache=True)], places=("accumulated", "ddp")),
    # In bf16 other weights are the smallest, and pruned.
    "packnet": Case(lambda: [PackNet()], places=("accumulated", "ddp")),
    "l2sp": Case(lambda: [L2SP(strength=1.0)]),
    "ewc": Case(lambda: [EWC(strength=100.0, examples=6)]),
    "ewc, proximal": Case(lambda: [EWC(strength=1000.0, examples=6, proximal=True)]),
    "ewc, LoRA": Case(lambda: [EWC(strength=3000.0, examples=6)], lora=True),
    "ewc, effective": Case(
        lambda: [EWC(strength=3000.0, examples=6, on="effective")], lora=True, places=WHOLE
    ),
    "si": Case(lambda: [SI(strength=10.0)]),
    "si, LoRA": Case(lambda: [SI(strength=100.0)], lora=True),
    "si, effective": Case(lambda: [SI(strength=100.0, on="effective")], lora=True, places=WHOLE),
    "mas": Case(lambda: [MAS(strength=10.0, examples=6)]),
    "mas, LoRA": Case(lambda: [MAS(strength=100.0, examples=6)], lora=True),
    "mas, effective": Case(
        lambda: [MAS(strength=100.0, examples=6, on="effective")], lora=True, places=WHOLE
    ),
    "hierarchical": Case(lambda: [Hierarchical(strength=100.0)]),
    "lwf": Case(lambda: [LwF(strength=20.0, temperature=1.0)], places=WHOLE),
    "lwf, recorded": Case(lambda: [LwF(strength=20.0, targets="recorded")]),
    "kl_base, LoRA": Case(lambda: [KLBase(strength=20.0)], lora=True, places=WHOLE),
    "eaft": Case(lambda: [EAFT(top_k=5)], places=("accumulated", "ddp", "fsdp")),
    "label_smoothing": Case(lambda: [LabelSmoothing()], places=("accumulated", "ddp", "fsdp")),
    "der_pp": Case(lambda: [DERpp(rows=5, strength=5.0)], places=WHOLE),
    # In bf16 another token would be drawn where two are nearly as likely.
    "pseudo_replay": Case(
        lambda: [PseudoReplay(ratio=0.0, general=0.5, distil=1.0, perplexity=1e6), Backwards()],
        places=("accumulated", "checkpointed", "ddp"),
    ),
    # In bf16 another angle between two gradients is no rounding of what a projection does.
    "agem": Case(lambda: [AGEM(rows=5)], places=("accumulated", "checkpointed", "ddp")),
    "feature_replay": Case(
        lambda: [FeatureReplay(rows=5)], places=("accumulated", "checkpointed", "ddp")
    ),
    "gem, LoRA": Case(
        lambda: [GEM(rows=5)], lora=True, places=("accumulated", "checkpointed", "ddp")
    ),
    # The slow weights are trained only from the second task on, if it starts from them.
    "ema": Case(lambda: [EMA(decay=0.5, start="slow")]),
    "ilora, LoRA": Case(
        lambda: [ILoRA(rows=5, decay=0.5)], lora=True, places=("accumulated", "checkpointed", "ddp")
    ),
    "mixture": Case(
        lambda: [Mixture(layers=0.0)],
        lora=True,
        places=("accumulated", "checkpointed", "ddp"),
    ),
    "olora": Case(lambda: [OLoRA(strength=0.01)], lora=True, places=("accumulated", "ddp")),
    "osf": Case(lambda: [OSF()], places=WHOLE),
    "wise": Case(lambda: [WiSE()]),
    "der": Case(lambda: [DER(rows=5)], places=("ddp",)),
    "joint": Case(lambda: [Joint(), Backwards()]),
    "inc_lora": Case(lambda: [IncLoRA()], lora=True, places=("ddp",)),
    "merge": Case(lambda: [Merge(form="slerp")], places=WHOLE),
    "adapters, added weights": Case(lambda: [Adapters(rank=4)], places=("ddp",)),
    "progressive, added weights": Case(lambda: [Progressive(rank=4)], places=("ddp",)),
    "progressive_prompts, added weights": Case(lambda: [ProgressivePrompts()], places=("ddp",)),
    "prompt, added weights": Case(lambda: [PromptTuning()], places=("ddp",)),
    "retrieval": Case(lambda: [Retrieval()], places=("ddp", "fsdp")),
    # Enough tokens to draw from that some texts end.
    "self_rewrite": Case(
        lambda: [SelfRewrite(agree="any", top_k=100), Backwards()], places=("ddp",)
    ),
    "seq_star, classifier": Case(lambda: [SeqStar()], classes=4, places=("ddp",)),
}


# Stopped in the middle of a task, and taken up again: what keeps shards, and what keeps weights.
BROKEN = ("spring", "wise", "joint")
# What FSDP cannot do, and how the refusal begins.
REFUSED = {
    "task_lora": "The methods task_lora add weights to a model that FSDP",
    "pseudo_replay": "'pseudo_replay' cannot let the model write while FSDP",
    "mixture": "The method 'mixture' adds weights to a model that FSDP",
    "half": "The method 'half' cannot choose what is trained while FSDP",
    "freeze, cached": "The method 'freeze' cannot choose",
    "packnet": "The method 'packnet' cannot choose",
    "der": "The method 'der' cannot take a second gradient while FSDP",
    "inc_lora": "The method 'inc_lora' adds weights to a model that FSDP has sharded",
    "lwf": "The method 'lwf' cannot run the model with old weights while FSDP",
    "kl_base, LoRA": "The method 'kl_base' cannot run a second model while FSDP",
    "der_pp": "The method 'der_pp' cannot take a second gradient while FSDP",
    "agem": "The method 'agem' cannot take a second gradient while FSDP",
    "gem, LoRA": "The method 'gem' cannot take a second gradient while FSDP",
    "feature_replay": "The method 'feature_replay' cannot freeze layers while FSDP",
    "ilora, LoRA": "The method 'ilora' cannot run the model with slow weights while FSDP",
    "olora": "The method 'olora' adds weights to a model that FSDP has sharded",
    "osf": "The method 'osf' needs whole matrices, but FSDP",
    "merge": "The method 'merge' needs whole weights, but FSDP",
    "adapters, added weights": "The method 'adapters' cannot choose what is trained while FSDP",
    "progressive, added weights": "The methods progressive add weights to a model",
    "progressive_prompts, added weights": "The method 'progressive_prompts' cannot choose what",
    "prompt, added weights": "The method 'prompt' cannot choose what is trained while FSDP",
    "self_rewrite": "The method 'self_rewrite' cannot let the model write while FSDP",
    "seq_star, classifier": "seq_star holds rows of the classifier, which FSDP cuts into shards",
}


def rows(task: int, classes: int = 0) -> Dataset:
    """Answers of different lengths, so that a mean of the processes' means would be wrong."""
    g = torch.Generator().manual_seed(task)
    ids = torch.randint(6, pico.VOCAB, (BATCH * STEPS, 10), generator=g).tolist()
    if classes:
        own = torch.randint(classes // 2, (BATCH * STEPS,), generator=g) + task * classes // 2
        return Dataset.from_dict({"input_ids": ids, "labels": own.tolist()})
    answers = torch.randint(3, 9, (BATCH * STEPS,), generator=g).tolist()
    labels = [[-100] * cut + row[cut:] for row, cut in zip(ids, answers, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@contextmanager
def fresh_accelerator(*, fsdp: bool) -> Iterator[None]:
    """Let the next trainer choose its parallelism anew; Accelerate keeps its choice for good."""
    own = Trainer.create_accelerator_and_postprocess

    def with_fsdp(self: Any) -> None:
        # Accelerate offers FSDP to accelerators only, though gloo can do it as well.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        own(self)

    if fsdp:
        Trainer.create_accelerator_and_postprocess = with_fsdp
    try:
        yield
    finally:
        Trainer.create_accelerator_and_postprocess = own
        AcceleratorState._reset_state(reset_partial_state=True)


def trainer_of(case: Case, place: Place, folder: Path) -> TextTrainer | ClassifierTrainer:
    """The trainer of `keeptune run`, for the pico Llama."""
    model: Any = pico.classifier(case.classes) if case.classes else pico.causal_lm()
    if case.lora:
        model = pico.adapted(model)
    tokenizer = pico.tokenizer(chat=True)
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH // place.processes // place.cut,
        "gradient_accumulation_steps": place.cut,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        # Or Adam makes whole steps of the rounding of gradients that are next to 0.
        "adam_epsilon": 1e-3,
        "use_cpu": True,
        "seed": 0,
        **place.settings,
    }
    return build_trainer(
        "classification" if case.classes else "causal_lm",
        model,
        tokenizer,
        rows(0, case.classes),
        case.methods(),
        settings,
        collate(tokenizer),
    )


def outcome(trainer: TextTrainer | ClassifierTrainer) -> Tensors:
    """The trained weights, and what each method keeps, all whole."""
    assert trainer.ctx is not None
    kept = {f"weights/{n}": whole(local(p), spec_of(p)) for n, p in trained(trainer).items()}
    for method in trainer.strategy:
        own = method.state().tensors
        kept |= {f"{method.name()}/{n}": whole(local(t), spec_of(t)) for n, t in own.items()}
    return {n: t.detach().clone() for n, t in kept.items()}


def trained(trainer: TextTrainer | ClassifierTrainer) -> dict[str, torch.nn.Parameter]:
    """The weights that the methods see."""
    assert trainer.ctx is not None
    return trainer.ctx.trainable()


def run(case: Case, place: Place, folder: Path) -> Tensors:
    """Learn two tasks; weights and states, as "task/weights or method/name".

    The weights that training began with are under "start".
    """
    fsdp = "fsdp" in place.settings
    with fresh_accelerator(fsdp=fsdp):
        trainer = trainer_of(case, place, folder)
        begun = trainer.model.named_parameters()
        found = {f"start/weights/{n}": p.detach().clone() for n, p in begun if p.requires_grad}
        for task in (0, 1):
            trainer.learn(f"t{task}", rows(task, case.classes))
            assert all(isinstance(p, DTensor) == fsdp for p in trained(trainer).values())
            found |= {f"{task}/{n}": t for n, t in outcome(trainer).items()}
        return found


def run_with_a_break(case: Case, place: Place, folder: Path) -> Tensors:
    """As `run`, stopped in the middle of the second task and taken up by a new trainer."""
    stop, fsdp = Event(), "fsdp" in place.settings
    with fresh_accelerator(fsdp=fsdp):
        trainer = trainer_of(case, place, folder)
        trainer.progress_root = folder
        trainer.learn("t0", rows(0))
        trainer.watch(lambda done, *_: stop.set() if done == STEPS // 2 else None, 60, stop)
        trainer.learn("t1", rows(1))
        distributed.barrier()  # the first process has written the state
    with fresh_accelerator(fsdp=fsdp):
        trainer = trainer_of(case, place, folder)
        (saved,) = folder.glob("001-*")
        trainer.learn("t1", rows(1), index=1, resume=saved)
        return {f"1/{n}": t for n, t in outcome(trainer).items()}


def main(rank: int, meeting: str, folder: Path) -> None:
    """One of the processes: every case in every place that takes several."""
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    for name, case in CASES.items():
        for place in case.places:
            if PLACES[place].processes > 1:
                found = run(case, PLACES[place], folder)
                save_file(found, folder / f"{name}.{place}.{rank}.safetensors")
    for name in BROKEN:
        for place in ("ddp", "fsdp"):
            found = run_with_a_break(CASES[name], PLACES[place], folder / name / place)
            save_file(found, folder / f"break.{name}.{place}.{rank}.safetensors")
    for name in REFUSED:
        try:
            run(CASES[name], PLACES["fsdp"], folder)
        except MethodError as error:
            (folder / f"refused.{name}.{rank}").write_text(str(error))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest
    # Accelerate asks for an address, though the processes meet at a file.
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1", WORLD_SIZE=str(PROCESSES))
    os.environ.update(RANK=sys.argv[1], LOCAL_RANK=sys.argv[1], OMP_NUM_THREADS="1")
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
