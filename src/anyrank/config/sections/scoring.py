"""`[eval]`: when and how models are scored."""

from __future__ import annotations

from dataclasses import dataclass

from anyrank.config.describe import COUNT, LATER, key
from anyrank.config.sections.values import expect, one_of

SCORES = ("auto", "exact", "generate", "likelihood")
EXTRACTS = ("auto", "text", "number", "option")
WHERE = ("server", "sites")


@dataclass(frozen=True)
class EvalConfig:
    """`[eval]`: when and how the global model is scored on held-out examples."""

    every: int = key(
        1,
        "Number of rounds from one scoring to the next. The last round is always scored.",
        COUNT,
        {"transformers": "eval_steps"},
    )
    batch_size: int = key(
        1024, "Number of examples that are scored at a time.", COUNT, {"transformers": "per_device_eval_batch_size"}
    )
    score: str = key(
        "auto",
        "When an answer is correct: if every token of the completion is the most likely one (exact), if the answer extracted "
        "from the text that the model writes is right (generate), or if the completion is the most likely of the options "
        "(likelihood). auto: the default of the data's format.",
        SCORES,
    )
    extract: str = key(
        "auto",
        "What is extracted from an answer: its whole text, its final number, or the first option in it. auto: the default "
        "of the data's format.",
        EXTRACTS,
    )
    max_new_tokens: int = key(
        256, "Maximum number of tokens that the model writes for one answer, for score = 'generate'.", COUNT
    )
    length_normalized: bool = key(
        False,
        "Whether options are compared by their likelihood per token, for score = 'likelihood'.",
        also={"lm-eval": "acc_norm"},
    )
    metrics: tuple[str, ...] = key(
        (),
        "Names of metrics to compute in addition to accuracy and loss.",
        "different names",
        {"transformers": "compute_metrics"},
        metadata=LATER,
    )
    file: str = key("", "A Python file that registers your own metrics under names in eval.metrics.", metadata=LATER)
    where: str = key(
        "server",
        "Who scores: the server, on all held-out examples after a round (server), or each client, on its own held-out "
        "examples, what it downloads before it trains (sites). A round's figures are then those of the state that it started "
        "from. With privacy, sites report no scores.",
        WHERE,
        metadata=LATER,
    )
    by_label: bool = key(False, "Whether clients report their scores by label, too, for where = 'sites'.", metadata=LATER)

    def __post_init__(self) -> None:
        expect(self.every >= 1, "eval.every", COUNT, self.every)
        expect(self.batch_size >= 1, "eval.batch_size", COUNT, self.batch_size)
        one_of(self.score, SCORES, "eval.score")
        one_of(self.extract, EXTRACTS, "eval.extract")
        expect(self.max_new_tokens >= 1, "eval.max_new_tokens", COUNT, self.max_new_tokens)
        expect(len(set(self.metrics)) == len(self.metrics), "eval.metrics", "different names", list(self.metrics))
        one_of(self.where, WHERE, "eval.where")
        at_sites = self.where == "sites"
        none = "no metrics with eval.where = 'sites', which reports accuracy and loss"
        expect(not (at_sites and (self.metrics or self.file)), "eval.metrics", none, list(self.metrics) or self.file)
        expect(at_sites or not self.by_label, "eval.by_label", "false with eval.where = 'server'", self.by_label)
