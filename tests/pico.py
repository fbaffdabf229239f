"""Pico models and tokenizers, built in process in milliseconds, for every test."""

from __future__ import annotations

import json
import string
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS, UNK, TURN, END = SPECIAL = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
)
VOCAB = len(SPECIAL) + len(string.printable)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(
    *,
    chat: bool = False,
    pad: bool = True,
    eos: bool = True,
    bos: bool = False,
    letters: str = string.printable,
) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; the same ids for every combination of flags.

    Args:
        chat: With a ChatML template; a turn ends with <|im_end|>, which is not the EOS.
        pad: Whether it has a pad token.
        eos: Whether it has an EOS token.
        bos: Whether encoding puts <s> in front, as Llama tokenizers do.
        letters: What it knows; anything else is <unk>.
    """
    core = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *letters])}, unk_token=UNK)
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS if eos else None,
        pad_token=PAD if pad else None,
        unk_token=UNK,
        chat_template=CHATML if chat else None,
        clean_up_tokenization_spaces=False,
    )


def _sizes(vocab: int, context: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "pad_token_id": SPECIAL.index(PAD),
        "bos_token_id": SPECIAL.index(BOS),
        "eos_token_id": SPECIAL.index(EOS),
    }


def causal_lm(vocab: int = VOCAB, seed: int = 0, *, context: int = 512) -> LlamaForCausalLM:
    """A Llama of about 20,000 weights in float32; the global RNG stays as it was."""
    config = LlamaConfig(
        **_sizes(vocab, context), num_key_value_heads=2, tie_word_embeddings=True, dtype="float32"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def classifier(
    labels: int = 2, seed: int = 0, *, bert: bool = False, context: int = 512
) -> LlamaForSequenceClassification | BertForSequenceClassification:
    """A sequence classifier with `labels` classes: a Llama, or a BERT when `bert`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if bert:
            return BertForSequenceClassification(
                BertConfig(**_sizes(VOCAB, context), num_labels=labels)
            ).eval()
        config = LlamaConfig(**_sizes(VOCAB, context), num_key_value_heads=2, num_labels=labels)
        return LlamaForSequenceClassification(config).eval()


def adapted(model: PreTrainedModel, config: PeftConfig | None = None, seed: int = 1) -> PeftModel:
    """Wrap a model in a PEFT adapter: by default a LoRA that already changes what it says."""
    config = config or LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT 0.21 reads an attribute that transformers renamed
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    return wrapped


def tiny_folder(tmp_path: Path, *, chat: bool = False, seed: int = 0) -> Path:
    """Save `causal_lm` and `tokenizer` as a Hugging Face folder and return its path."""
    folder = tmp_path / "tiny"
    causal_lm(seed=seed).save_pretrained(folder)
    tokenizer(chat=chat).save_pretrained(folder)
    return folder


def questions(task: int, n: int) -> list[dict[str, str]]:
    """Rows of a task, each with a letter of its own for an answer."""
    return [
        {"prompt": f"{task}{i}:", "completion": f" {chr(97 + (5 * i + task) % 26)}"}
        for i in range(n)
    ]


def by_heart(
    home: Path, out: str, guard: str, *, tasks: int = 2, steps: int, **changes: Any
) -> dict[str, Any]:
    """A recipe of tasks t0, t1 that are learned by heart, scored by perplexity, with a guard.

    Args:
        home: Has `tiny`, `t0.jsonl`, `t1.jsonl` and the guard's texts.
        out: The run folder, in `home`.
        guard: Name of the file with its texts.
        tasks: How many of them.
        steps: Of each.
        **changes: Further keys, or other values.
    """
    names = [str(home / f"t{task}.jsonl") for task in range(tasks)]
    return {
        "model": str(home / "tiny"),
        "adapter": "none",
        "tasks": [
            {"name": f"t{i}", "train": n, "eval": n, "recall": True, "score": "perplexity"}
            for i, n in enumerate(names)
        ],
        "guards": [{"name": "old", "text": str(home / guard)}],
        "trainer": {
            "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "bf16": False,  # so that a GPU learns as much as a processor
        },
        "out": str(home / out),
        **changes,
    }  # fmt: skip


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows to a .jsonl file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
