"""What the files of a run folder say, as pydantic models: `folder` writes and reads them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1
Unit = Literal["share", "perplexity"]
Kind = Literal["task", "guard"]
Measure = Literal["task", "guard", "gain", "change", "metric"]


class _Record(BaseModel):
    # JSON has no infinity; without this it would be written as null and could not be read back
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Example(_Record):
    """One evaluated example.

    Attributes:
        id: Position of the row in its evaluation data.
        prompt: What the model was given.
        expected: The right answer.
        answer: What the model answered.
        score: Share right, 0 to 1; for perplexity the mean negative log-likelihood, nats a token.
        weight: Weight in the mean; 1, or the number of tokens for perplexity.
    """

    id: int
    prompt: str
    expected: str
    answer: str
    score: float
    weight: float = 1.0


class Cell(_Record):
    """One entry of R: the score of one task or guard after one task of the stream.

    Attributes:
        name: The task's or guard's name.
        score: Weighted mean of the examples' scores, or the perplexity.
        unit: "share" (0 to 1, higher is better) or "perplexity" (lower is better).
        n: Number of examples.
        seconds: What it took to evaluate.
        added_tokens: Tokens put before the questions, all together.
        added_seconds: Of `seconds`, those spent on finding them.
        truncated: Examples longer than the context: questions lost their beginning, text its end.
        examples: Per-example results, in row order; empty only where a tool gives none.
    """

    name: str
    score: float
    unit: Unit
    n: int
    seconds: float = 0.0
    added_tokens: int = 0
    added_seconds: float = 0.0
    truncated: int = 0
    examples: list[Example] = []


class DataInfo(_Record):
    """A task or guard as run.json lists it; hashes are SHA-256.

    Attributes:
        recall: The evaluation rows are training rows on purpose.
        transfer_of: For a guard that asks a task's facts in another way: that task.
        leaked_rows: Evaluation rows that are also training rows.
        truncated_rows: Training rows cut to the longest length allowed.
        dropped_rows: Training rows left out because nothing to learn was left of them.
    """

    name: str
    score: str
    unit: Unit
    recall: bool = False
    transfer_of: str = ""
    train_rows: int = 0
    leaked_rows: int = 0
    truncated_rows: int = 0
    dropped_rows: int = 0
    train_tokens: int = 0
    train_sha256: str = ""
    eval_rows: int = 0
    eval_sha256: str = ""


class MethodInfo(_Record):
    """A method as run.json lists it, with what proves that it was active."""

    name: str
    settings: dict[str, Any]
    is_neutral: bool
    proof: str
    active_from: int


class Evidence(_Record):
    """What one method did while one task was learned."""

    name: str
    values: dict[str, Any]


class TaskEvidence(_Record):
    """Evidence of every method for one task; `index` counts from 0."""

    task: str
    index: int
    methods: list[Evidence]


class Routes(_Record):
    """Of each learned task, how many questions go to which task when theirs is not told."""

    tasks: dict[str, dict[str, int]]

    def right(self, task: str) -> float:
        """The share of a task's questions that are taken for its own."""
        chosen = self.tasks[task]
        return chosen.get(task, 0) / sum(chosen.values())


class Phase(_Record):
    """Seconds and tokens of one phase: load, train, end_task, evaluate or save."""

    phase: str
    task: str = ""
    seconds: float
    tokens: int = 0


class Cost(_Record):
    """What the run cost.

    Attributes:
        phases: In the order they ran; a resumed run adds only what it did itself.
        peak_memory_bytes: Largest resident size of the process (plus the GPU's peak).
        stored_bytes: Bytes of state per method name, plus "weights".
    """

    phases: list[Phase] = []
    peak_memory_bytes: int = 0
    stored_bytes: dict[str, int] = {}


class Spread(_Record):
    """How much one number of a run varies by chance; higher is better: perplexities are minus logs.

    Attributes:
        kind: "task" or "guard" for its score at the end, "gain" for what training added to a task,
            "change" for what came after, or of a guard since the start; or "metric".
        name: The task's or guard's name, or the metric's key.
        unit: "share" (0 to 1) or "perplexity", then in minus its logarithm.
        again: The run's own value and those of the same weights scored in other batches; of scores.
        seeds: The run's own value and those of other seeds.
        examples: Standard error by the choice of evaluation examples.
        paired: The same of the difference between two runs on the same examples, over all pairs of
            seeds; None where there is one seed.
    """

    kind: Measure
    name: str
    unit: Unit
    again: list[float] = []
    seeds: list[float]
    examples: float
    paired: float | None = None


class Noise(_Record):
    """noise.json: what `keeptune noise` measured.

    Attributes:
        tasks: How many tasks the run had learned then.
        seeds: The seeds compared, the run's own first.
        batch_sizes: Rows at a time in each scoring, the run's own first.
        spreads: Of every task, guard and metric.
    """

    tasks: int
    seeds: list[int]
    batch_sizes: list[int]
    spreads: list[Spread]


class RunInfo(_Record):
    """run.json: everything about a run that is not a result.

    Attributes:
        status: "running", "stopped" (by the user), "failed" or "done".
        strategy: The methods' names joined by " + ".
        recipe_sha256: Hash of what must not change on resume.
        provenance: Versions, machine, time of the start.
        warnings: Sentences shown at the top of the report.
        forget_requests: How often `keeptune forget` removed examples.
    """

    format: int = FORMAT
    status: Literal["running", "stopped", "failed", "done"] = "running"
    seed: int
    strategy: str
    recipe_sha256: str
    model: dict[str, Any]
    tasks: list[DataInfo]
    guards: list[DataInfo]
    methods: list[MethodInfo]
    provenance: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = []
    forget_requests: int = 0
