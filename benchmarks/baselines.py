"""What `anyrank`'s engine is measured against, written out as one would write it with PEFT alone.

Each baseline trains the same clients from the same downloads on the same batches, and the same server merges what they send;
only the way a client is trained and a model is scored differs: the task's whole model runs, from token ids or pixels. Texts are
tokenised once, before any clock runs, for all of them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.data import texts as sources
from anyrank.messages.plan import Plan
from anyrank.messages.records import BOTH, ClientUpdate, Download, Job, Scaling, Scores
from anyrank.tasks.base import Examples
from anyrank.tasks.language.scoring import Completion
from anyrank.tasks.text.encoder import find_source
from anyrank.training import local

TEXTS_AT_A_TIME = 64  # in scoring: padded to the longest of more of them, a loop would take longer


class TextClassifier(nn.Module):
    """A transformers encoder with mean pooling and a head: the module of anyrank's text task, run from token ids.

    `map`: what lies between the text's vector and the head, if anything does.
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear, map: nn.Linear | None = None) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        if map is not None:
            self.map = map

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        total = (output.last_hidden_state * attention_mask[:, :, None]).sum(dim=1)
        vectors = F.normalize(total / attention_mask.sum(dim=1, keepdim=True), dim=1)
        if hasattr(self, "map"):
            vectors = F.normalize(self.map(vectors), dim=1)
        return self.head(20 * vectors)


class Data(Protocol):
    """Examples as a loop has them: batches, the loss of each example of one, and how a model does on all of them."""

    def batch(self, index: np.ndarray) -> tuple[dict[str, Tensor], Tensor]: ...

    def losses(self, outputs: Any, labels: Tensor) -> Tensor: ...

    def score(self, model: nn.Module) -> Scores: ...


class Classified:
    """What classifiers' data have in common: cross-entropy, and scores by a plain forward pass."""

    at_a_time: int
    labels: Tensor

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="none")

    @torch.no_grad()
    def score(self, model: nn.Module) -> Scores:
        correct, losses = [], []
        for start in range(0, len(self.labels), self.at_a_time):
            inputs, labels = self.batch(np.arange(start, min(start + self.at_a_time, len(self.labels))))
            logits = model(**inputs)
            correct.append(logits.argmax(dim=1) == labels)
            losses.append(self.losses(logits, labels))
        return Scores(torch.cat(correct).numpy(), torch.cat(losses).double().numpy(), self.labels.numpy())


@dataclass
class Texts(Classified):
    """Tokenised texts, padded batch by batch to the longest of the batch; `segments`: of pairs, which text a token is of."""

    ids: list[list[int]]
    labels: Tensor
    segments: list[list[int]] | None = None
    at_a_time: int = TEXTS_AT_A_TIME

    def batch(self, index: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        ids = [self.ids[i] for i in index]
        inputs = {"input_ids": padded(ids), "attention_mask": padded([[1] * len(each) for each in ids])}
        if self.segments is not None:
            inputs["token_type_ids"] = padded([self.segments[i] for i in index])
        return inputs, self.labels[torch.from_numpy(index)]


@dataclass
class Images(Classified):
    """Images in one tensor."""

    values: Tensor
    labels: Tensor
    at_a_time: int = 1024

    def batch(self, index: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        chosen = torch.from_numpy(index)
        return {"inputs": self.values[chosen]}, self.labels[chosen]


@dataclass
class Completions:
    """Prompts with completions as token ids: the first `prompts[i]` of `ids[i]` are given. Held-out ones are asked by
    `objective`, which says how many tokens an answer may have, and what of it counts."""

    ids: list[list[int]]
    prompts: list[int]
    labels: Tensor
    objective: Completion

    def batch(self, index: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        ids = [self.ids[i] for i in index]
        learned = [[-100] * self.prompts[i] + self.ids[i][self.prompts[i] :] for i in index]
        inputs = {"input_ids": padded(ids), "attention_mask": padded([[1] * len(each) for each in ids])}
        return inputs, padded(learned, -100)

    def losses(self, outputs: Any, labels: Tensor) -> Tensor:
        wanted = labels[:, 1:]
        losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), wanted, ignore_index=-100, reduction="none")
        return losses.sum(dim=1) / (wanted != -100).sum(dim=1)

    @torch.no_grad()
    def score(self, model: nn.Module) -> Scores:
        inputs, labels = self.batch(np.arange(len(self.ids)))
        losses = self.losses(model(**inputs), labels)
        judge, questions = self.objective.judge, self.objective.questions
        given = [ids[:prompt] for ids, prompt in zip(self.ids, self.prompts, strict=True)]
        asked = {"input_ids": padded(given, left=True), "attention_mask": padded([[1] * len(p) for p in given], left=True)}
        written = model.generate(**asked, max_new_tokens=judge.limit, do_sample=False)[:, asked["input_ids"].shape[1] :]
        answers = [judge.extract(questions.decode(tokens), ()) for tokens in written.tolist()]
        correct = [answer == judge.extract(item.reference, ()) for answer, item in zip(answers, questions.items, strict=True)]
        return Scores(np.array(correct), losses.double().numpy(), self.labels.numpy())


def padded(rows: Sequence[Sequence[int]], fill: int = 0, left: bool = False) -> Tensor:
    """Rows of numbers, filled up to the longest of them behind, or in front (`left`)."""
    longest = max(map(len, rows))
    missing = [[fill] * (longest - len(row)) for row in rows]
    return torch.tensor([[*more, *row] if left else [*row, *more] for row, more in zip(rows, missing, strict=True)])


@dataclass
class PeftLoop:
    """(a) One client after another: a PEFT model of the client's rank on the shared base, and a hand-written training step."""

    model: nn.Module
    data: Data
    test: Data
    shards: Mapping[str, np.ndarray]
    inside: str = ""  # where in the model the part lies that PEFT wraps

    def train(self, jobs: Sequence[Job], plan: Plan, mechanism: None = None, deadline_s=None) -> Iterator[ClientUpdate]:
        for job in jobs:
            if job.download.train != BOTH or job.download.pruning:
                raise NotImplementedError("the loop trains A and B, and prunes nothing")
            examples = self.shards[job.client.name]
            with self.wrapped(job.download.adapter, job.download.merged) as peft_model:
                losses = self.fit(peft_model, examples, local.batches(len(examples), plan, job.client.name), plan)
                adapter = read(peft_model, job.download)
            yield ClientUpdate(adapter, len(examples), job.client.name, {"loss": float(np.mean(losses))})

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        with self.wrapped(adapter, merged) as peft_model:
            return self.test.score(self.model if self.inside else peft_model)

    @contextlib.contextmanager
    def wrapped(self, adapter: Adapter, merged: Adapter | None) -> Iterator[PeftModel]:
        """A PEFT model with `adapter` on the shared base, whose weights have `merged` added to them for as long."""
        base = getattr(self.model, self.inside) if self.inside else self.model
        kept = add(base, merged) if merged else {}
        peft_model = get_peft_model(base, lora_config(adapter))
        set_peft_model_state_dict(peft_model, state_dict(adapter))
        if self.inside:
            setattr(self.model, self.inside, peft_model)
        try:
            yield peft_model
        finally:
            base = peft_model.unload()
            if self.inside:
                setattr(self.model, self.inside, base)
            else:
                self.model = base
            for name, weight in kept.items():
                base.get_submodule(name).weight.data.copy_(weight)

    def fit(self, peft_model: PeftModel, examples: np.ndarray, batches: list[np.ndarray], plan: Plan) -> list[float]:
        module = self.model if self.inside else peft_model
        optimizer = optimizer_of([parameter for parameter in peft_model.parameters() if parameter.requires_grad], plan)
        losses = []
        for index in batches:
            inputs, labels = self.data.batch(examples[index])
            loss = self.data.losses(module(**inputs), labels).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def add(base: nn.Module, merged: Adapter) -> dict[str, Tensor]:
    """Add low-rank sums to the weights of `base`; the weights as they were come back."""
    kept = {}
    for name, layer in merged.layers.items():
        weight = base.get_submodule(name).weight.data
        kept[name] = weight.clone()
        weight.add_(layer.delta().view_as(weight))
    return kept


def optimizer_of(trained: list[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    config = plan.config
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained, plan.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(trained, plan.learning_rate, weight_decay=config.weight_decay)


class HFTrainer(PeftLoop):
    """(b) The same with a new transformers `Trainer` for each client, as research code on federated LoRA runs it."""

    def fit(self, peft_model: PeftModel, examples: np.ndarray, batches: list[np.ndarray], plan: Plan) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=len(batches[0]),
                max_steps=len(batches),
                learning_rate=plan.learning_rate,
                weight_decay=plan.config.weight_decay,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                optim="adamw_torch",
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            order = Order(np.concatenate([examples[index] for index in batches]))
            module = WithLoss(self.model if self.inside else peft_model)
            trainer = InOrder(module, arguments, data_collator=self.collate, train_dataset=order)
            return [trainer.train().training_loss]

    def collate(self, index: list[int]) -> dict[str, Tensor]:
        inputs, labels = self.data.batch(np.array(index))
        return inputs | {"labels": labels}


class WithLoss(nn.Module):
    """A classifier in the form that `Trainer` asks for."""

    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        logits = self.model(**inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Order(Dataset):
    """Examples in the order in which they are trained on."""

    def __init__(self, index: np.ndarray) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> int:
        return int(self.index[place])


class InOrder(Trainer):
    """A `Trainer` that keeps the order of its dataset, so that all trainers see the same batches."""

    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def lora_config(adapter: Adapter) -> LoraConfig:
    """PEFT's configuration of an adapter whose layers have one rank and one scaling."""
    layer = next(iter(adapter.layers.values()))
    return LoraConfig(
        r=layer.rank,
        lora_alpha=layer.scaling * layer.rank,
        target_modules=list(adapter.layers),
        modules_to_save=sorted({name.rpartition(".")[0] for name in adapter.tensors}) or None,
        lora_dropout=0.0,
    )


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    factors = {f"base_model.model.{name}": tensor for name, tensor in adapter.tensors.items()}
    for name, layer in adapter.layers.items():
        A, B = layer.A, layer.B
        if layer.kind == "conv2d":
            A, B = A.unflatten(1, (-1, *layer.kernel)), B[:, :, None, None]
        factors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    return factors


def read(peft_model: PeftModel, download: Download) -> Adapter:
    found = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(peft_model).items()}
    layers: dict[str, LoraLayer] = {}
    for name, layer in download.adapter.layers.items():
        A, B = (found[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        layers[name] = layer.with_factors(A.flatten(1), B.flatten(1))
    tensors = {name: found[f"base_model.model.{name}"] for name in download.adapter.tensors}
    return Adapter(layers, tensors, download.adapter.config)


# --- the baseline of a federation --------------------------------------------------------------------------------------


def baseline(kind: type[PeftLoop], built: Any) -> PeftLoop:
    """A baseline over the clients of a federation, which starts from the same adapter; the federation's model is closed."""
    config, model = built.config, built.engine.model
    start = model.start(built.population.levels()[-1], Scaling(config.lora.alpha, config.lora.scaling), config.run.seed)
    model.close()
    loop = _LOOPS[config.model.task](kind, built)
    loop.start = lambda *_: start
    torch.manual_seed(0)
    return loop


def _of_images(kind: type[PeftLoop], built: Any) -> PeftLoop:
    task = built.engine.model.task
    parts = (_pixels(part, built.config.eval.batch_size) for part in (task.train, task.test))
    return kind(task.module, *parts, built.engine.shards)


def _pixels(examples: Examples, at_a_time: int) -> Images:
    return Images(examples.inputs.batch(torch.arange(len(examples)))["inputs"], examples.labels, at_a_time)


def _of_texts(kind: type[PeftLoop], built: Any) -> PeftLoop:
    config, task = built.config, built.engine.model.task
    folder = find_source(config.model).folder
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [_tokens(tokenizer, part.texts, part.labels, config.model.max_length) for part in sources.load_split(config.data)]
    # A Trainer puts the model into training mode: without dropout it does the same work as the others.
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = AutoModel.from_pretrained(folder, local_files_only=True, **no_dropout).requires_grad_(False).eval()
    on_map = task.targets == ("map",)
    model = TextClassifier(encoder, task.module.head, task.module.map if on_map else None)
    return kind(model, *texts, built.engine.shards, inside="" if on_map else "encoder")


def _tokens(tokenizer: Any, texts: Sequence[Any], labels: np.ndarray, longest: int) -> Texts:
    pairs = isinstance(texts[0], tuple)
    columns = [list(column) for column in zip(*texts, strict=True)] if pairs else [list(texts)]
    found: Mapping[str, Any] = tokenizer(*columns, truncation=True, max_length=longest, padding=False)
    return Texts(found["input_ids"], torch.from_numpy(labels), found["token_type_ids"] if pairs else None)


def _of_completions(kind: type[PeftLoop], built: Any) -> PeftLoop:
    task = built.engine.model.task
    parts = (_prompted(part, task.objective) for part in (task.train, task.test))
    return kind(task.module.whole, *parts, built.engine.shards)


def _prompted(examples: Examples, objective: Completion) -> Completions:
    inputs = examples.inputs
    ids = [each.tolist() for each in inputs.tokens.split(inputs.lengths.tolist())]
    return Completions(ids, inputs.prompts.tolist(), examples.labels, objective)


_LOOPS = {"image-classification": _of_images, "text-classification": _of_texts, "causal-lm": _of_completions}
