"""The inputs of a module: examples in any container, given batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from anyrank.errors import DataError, ModelError, in_a_line

UNNAMED = ""  # stands for the first argument of the module's forward, whatever its name


@runtime_checkable
class Inputs(Protocol):
    """Examples that can be given to a module batch by batch."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of all examples."""
        ...

    @property
    def on_disk(self) -> bool:
        """Whether the examples are in a file, of which the operating system caches what fits in memory."""
        ...

    def batch(self, index: Tensor, equal_lengths: bool = False) -> dict[str, Tensor | bool]:
        """Keyword arguments of the module's `forward` for the examples `index` `[b]`.

        `equal_lengths`: each example takes the same space in the batch, so that the batch can be split by example.
        """
        ...


@dataclass(frozen=True, eq=False)
class TensorInputs:
    """Inputs of one shape, held as one tensor `[n, ...]` that the module takes as the argument `name`."""

    values: Tensor
    name: str = "inputs"
    on_disk: bool = False

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def batch(self, index: Tensor, equal_lengths: bool = False) -> dict[str, Tensor | bool]:
        return {self.name: self.values[index]}


@dataclass(frozen=True, eq=False)
class FieldInputs:
    """Several arguments of the module, each a tensor `[n, ...]` under its name."""

    fields: Mapping[str, Tensor]
    on_disk: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for values in self.fields.values())

    def batch(self, index: Tensor, equal_lengths: bool = False) -> dict[str, Tensor | bool]:
        return {name: values[index] for name, values in self.fields.items()}


@dataclass(frozen=True, eq=False)
class ItemInputs:
    """An indexable data set, such as a `torch.utils.data.Dataset`, which makes its items on request.

    `items[i]` is the module's input (a tensor, an array, a number, or a mapping of its arguments) or, with `paired`, a pair of
    input and label, or a mapping with the label under `label`. Items of a batch are combined by
    `torch.utils.data.default_collate`.
    """

    items: Any
    name: str = UNNAMED
    paired: bool = False
    label: str = ""
    on_disk: bool = False

    def __len__(self) -> int:
        return len(self.items)

    @property
    def nbytes(self) -> int:
        """Bytes of the first item times the number of items: exact if all have one size."""
        first = self.batch(torch.tensor([0]))
        return len(self) * sum(value.nbytes for value in first.values() if isinstance(value, Tensor))

    def batch(self, index: Tensor, equal_lengths: bool = False) -> dict[str, Tensor | bool]:
        from torch.utils.data import default_collate

        collated = default_collate([self._given(int(i)) for i in index])
        return dict(collated) if isinstance(collated, Mapping) else {self.name: collated}

    def _given(self, i: int) -> Any:
        item = self.items[i]
        if self.label:
            return {key: value for key, value in item.items() if key != self.label}
        return item[0] if self.paired else item


# --- from users' data ------------------------------------------------------------------------------------------------

_LABELS = ("labels", "label")  # keys of an item under which its label is looked for


def inputs_of(given: Any) -> Inputs:
    """`given` as inputs: a tensor or array `[n, ...]`, a mapping of the module's arguments to these, or anything indexable.

    Raises `DataError` for other types, for parts of different lengths, and for numbers that are not finite.
    """
    if isinstance(given, Inputs):
        return given
    if isinstance(given, (Tensor, np.ndarray)):
        return TensorInputs(_tensor(given, "inputs"), UNNAMED)
    if isinstance(given, Mapping):
        fields = {str(name): _tensor(values, str(name)) for name, values in given.items()}
        lengths = {name: len(values) for name, values in fields.items()}
        if not fields or len(set(lengths.values())) > 1:
            raise DataError(f"inputs: expected arguments of the module, all of one length, got {lengths or 'none'}")
        return FieldInputs(fields)
    if hasattr(given, "__len__") and hasattr(given, "__getitem__") and not isinstance(given, (str, bytes)):
        return ItemInputs(given)
    raise DataError(
        f"inputs: expected a tensor or array [n, ...], a mapping of the module's arguments to these, or a data set with len() "
        f"and [i], got {type(given).__name__}"
    )


def labels_of(given: Any) -> Tensor:
    """`given` as labels `[n]`: whole numbers as int64, others unchanged. Raises `DataError` if they are not numbers."""
    try:
        labels = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"labels: expected numbers [n], got something that cannot become a tensor ({in_a_line(error)})"
        ) from None
    if not len(labels.shape):
        raise DataError("labels: expected one per example [n], got a single number")
    if labels.is_floating_point():
        if not torch.isfinite(labels).all():
            raise DataError("labels: contain NaN or infinite values; remove those examples")
        return labels.float() if labels.dtype == torch.float64 else labels
    return labels.long()


def split_items(items: Any) -> tuple[ItemInputs, Tensor]:
    """The inputs and the labels of a data set whose items have both: pairs, or mappings with `labels` or `label`."""
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise DataError(f"Examples: expected inputs and labels, or a data set of pairs, got {type(items).__name__} alone")
    if not len(items):
        raise DataError("Examples: expected at least one example, got an empty data set")
    first = items[0]
    if isinstance(first, Mapping):
        label = next((key for key in _LABELS if key in first), None)
        if label is None:
            raise DataError(f"Examples: expected items with one of {', '.join(_LABELS)}, got {', '.join(map(str, first))}")
        return ItemInputs(items, label=label), labels_of([_number(items[i][label]) for i in range(len(items))])
    if isinstance(first, (tuple, list)) and len(first) == 2:
        return ItemInputs(items, paired=True), labels_of([_number(items[i][1]) for i in range(len(items))])
    raise DataError(f"Examples: expected items (input, label) or mappings with a label, got {type(first).__name__}")


def named(inputs: Inputs, module: nn.Module) -> Inputs:
    """`inputs` under the name of the first argument of the module's forward, if they have no name.

    Raises `ModelError` for arguments that the forward does not take.
    """
    if not isinstance(inputs, FieldInputs) and getattr(inputs, "name", None) != UNNAMED:
        return inputs
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(inputs, FieldInputs) and not takes_any:
        strange = sorted(inputs.fields.keys() - set(known))
        if strange:
            raise ModelError(
                f"inputs: {type(module).__name__}.forward takes {', '.join(known) or 'no argument by name'}, got "
                f"{strange[0]!r}; name the inputs as the module does"
            )
    if isinstance(inputs, FieldInputs):
        return inputs
    if not known:
        raise ModelError(
            f"{type(module).__name__}.forward: expected an argument that can be given by name, found none; wrap the module in "
            "one whose forward has a named argument"
        )
    return replace(inputs, name=known[0])


def pieces(inputs: Inputs, most: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `inputs`, by name, for a digest: all tensors in memory, and of other inputs at most `most` evenly spaced
    examples.
    """
    if isinstance(inputs, TensorInputs):
        yield inputs.name, inputs.values
    elif isinstance(inputs, FieldInputs):
        yield from sorted(inputs.fields.items())
    else:
        chosen = np.unique(np.linspace(0, len(inputs) - 1, min(most, len(inputs))).astype(int))
        for i in chosen.tolist():
            batch = inputs.batch(torch.tensor([i]))
            yield from ((f"{i}/{name}", value) for name, value in sorted(batch.items()) if isinstance(value, Tensor))


def _tensor(values: Any, name: str) -> Tensor:
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: expected numbers [n, ...], got something that cannot become a tensor ({in_a_line(error)})"
        ) from None
    if not tensor.ndim:
        raise DataError(f"{name}: expected one entry per example [n, ...], got a single number")
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise DataError(f"{name}: contain NaN or infinite values; fill or remove those examples")
    return tensor.detach()


def _number(label: Any) -> Any:
    return label.item() if isinstance(label, (Tensor, np.ndarray)) and label.size in (1, torch.Size([])) else label


def rows_of(given: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
    """Indices of examples as int64 `[n]`, sorted; a mask `[all]` of booleans is read as the examples it marks.

    Raises `DataError` for anything but whole numbers.
    """
    rows = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if rows.dtype == bool and rows.ndim == 1:
        return np.flatnonzero(rows)
    if rows.size == 0:
        return np.zeros(0, dtype=np.int64)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise DataError(f"expected whole numbers [n] or a mask of booleans, got {rows.dtype} of shape {rows.shape}")
    return np.sort(rows.astype(np.int64))
