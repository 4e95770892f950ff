"""What `anyrank`'s engine is measured against, written out as one would write it with PEFT alone.

Each baseline trains the same clients from the same downloads on the same batches, and the same server merges what they send;
only the way a client is trained differs. Texts are tokenised once, before any clock runs, for all of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from anyrank import local
from anyrank.adapter import Adapter, LoraLayer
from anyrank.engines.base import Job
from anyrank.records import ClientUpdate, Download


class TextClassifier(nn.Module):
    """A transformers encoder with mean pooling and a frozen head: the module of anyrank's text task, run from token ids."""

    def __init__(self, encoder: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("head", head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        total = (hidden * attention_mask[:, :, None]).sum(dim=1)
        return 20 * F.normalize(total / attention_mask.sum(dim=1, keepdim=True), dim=1) @ self.head.T


@dataclass
class Texts:
    """Tokenised texts, padded batch by batch to the longest of the batch."""

    ids: list[list[int]]
    labels: Tensor

    def batch(self, index: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        chosen = [self.ids[i] for i in index]
        longest = max(map(len, chosen))
        ids = torch.tensor([each + [0] * (longest - len(each)) for each in chosen])
        mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in chosen])
        return {"input_ids": ids, "attention_mask": mask}, self.labels[torch.from_numpy(index)]


@dataclass
class Images:
    """Images in one tensor."""

    values: Tensor
    labels: Tensor

    def batch(self, index: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        chosen = torch.from_numpy(index)
        return {"inputs": self.values[chosen]}, self.labels[chosen]


@dataclass
class PeftLoop:
    """(a) One client after another: a PEFT model of the client's rank on the shared base, and a hand-written training step."""

    model: nn.Module  # gives logits
    data: Texts | Images
    shards: Sequence[np.ndarray]
    inside: str = ""  # where in the model the part lies that PEFT wraps

    def train(self, jobs: Sequence[Job], plan: local.Plan) -> Iterator[ClientUpdate]:
        for job in jobs:
            examples = self.shards[job.index]
            peft_model = self.wrap(job.download)
            losses = self.fit(peft_model, examples, local.batches(len(examples), plan, job.client.name), plan)
            adapter = read(peft_model, job.download)
            self.unwrap(peft_model)
            yield ClientUpdate(adapter, len(examples), job.client.name, {"loss": float(np.mean(losses))})

    def wrap(self, download: Download) -> PeftModel:
        base = getattr(self.model, self.inside) if self.inside else self.model
        peft_model = get_peft_model(base, lora_config(download.adapter))
        set_peft_model_state_dict(peft_model, state_dict(download.adapter))
        if self.inside:
            setattr(self.model, self.inside, peft_model)
        return peft_model

    def unwrap(self, peft_model: PeftModel) -> None:
        base = peft_model.unload()
        if self.inside:
            setattr(self.model, self.inside, base)
        else:
            self.model = base

    def fit(self, peft_model: PeftModel, examples: np.ndarray, batches: list[np.ndarray], plan: local.Plan) -> list[float]:
        module = self.model if self.inside else peft_model
        trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=plan.config.weight_decay)
        losses = []
        for index in batches:
            inputs, labels = self.data.batch(examples[index])
            loss = F.cross_entropy(module(**inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


class HFTrainer(PeftLoop):
    """(b) The same with a new transformers `Trainer` for each client, as research code on federated LoRA runs it."""

    def fit(self, peft_model: PeftModel, examples: np.ndarray, batches: list[np.ndarray], plan: local.Plan) -> list[float]:
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
        r=layer.rank, lora_alpha=layer.scaling * layer.rank, target_modules=list(adapter.layers), lora_dropout=0.0
    )


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    factors = {}
    for name, layer in adapter.layers.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = layer.A
        factors[f"base_model.model.{name}.lora_B.weight"] = layer.B
    return factors


def read(peft_model: PeftModel, download: Download) -> Adapter:
    found = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(peft_model).items()}
    layers: dict[str, LoraLayer] = {}
    for name, layer in download.adapter.layers.items():
        A, B = (found[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        layers[name] = layer.with_factors(A, B)
    return Adapter(layers, {}, download.adapter.config)


def text_baseline(kind: type[PeftLoop], folder: str, texts: Sequence[str], labels: Tensor, head: Tensor, shards) -> PeftLoop:
    """A baseline on texts: the encoder in `folder`, the frozen `head` `[classes, width]`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(list(texts), truncation=True, max_length=64, padding=False)["input_ids"]
    # A Trainer puts the model into training mode: without dropout it does the same work as the others.
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = AutoModel.from_pretrained(folder, local_files_only=True, **no_dropout).requires_grad_(False).eval()
    return kind(TextClassifier(encoder, head), Texts(ids, labels), shards, inside="encoder")
