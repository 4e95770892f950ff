"""The inputs of a module: examples in any container, given batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from anyrank.errors import DataError, ModelError, in_a_line

UNNAMED = ""  # stands for the first argument of the module's forward, whatever its name


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

    `items[i]` is what the module takes (a tensor, an array, a number, or a mapping of its arguments) or, with `paired`, a pair
    of that and the label, or a mapping that has the label under `label`. Items of a batch are put together as
    `torch.utils.data.default_collate` does; float64 numbers, as NumPy and Python have them, become `dtype`.
    """

    items: Any
    name: str = UNNAMED
    paired: bool = False
    label: str = ""
    dtype: torch.dtype | None = None
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
        batch = dict(collated) if isinstance(collated, Mapping) else {self.name: collated}
        return {name: _narrowed(value, self.dtype) for name, value in batch.items()}

    def _given(self, i: int) -> Any:
        item = _item(self.items, i)
        if self.label:
            return {key: value for key, value in item.items() if key != self.label}
        return item[0] if self.paired else item


# --- from users' data ------------------------------------------------------------------------------------------------

_MOST_LABELS = 1_000_000
_LABELS = ("labels", "label")  # keys of an item under which its label is looked for


def inputs_of(given: Any) -> Inputs:
    """`given` as inputs: a tensor or array `[n, ...]`, a mapping of the module's arguments to these, or anything indexable.

    Raises `DataError` for other types, for parts of different lengths, and for numbers that are not finite.
    """
    if hasattr(given, "batch") and not hasattr(given, "__getitem__"):  # a data set may have a method `batch`, too
        return given
    if hasattr(given, "to_numpy") and hasattr(given, "columns"):  # a table of numbers, as pandas has it
        given = given.to_numpy()
    if isinstance(given, (list, tuple)) and not (len(given) and isinstance(given[0], (Tensor, Mapping))):
        given = np.asarray(given) if _rectangular(given) else given
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
        raise DataError(f"labels: expected numbers [n], got what makes no tensor ({in_a_line(error)})") from None
    labels = labels.detach()
    if not labels.ndim:
        raise DataError("labels: expected one an example [n], got a single number")
    if labels.layout != torch.strided:
        raise DataError("labels: expected a dense tensor; call to_dense()")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.is_floating_point():
        if not torch.isfinite(labels).all():
            raise DataError("labels: contain NaN or infinite values; remove those examples")
        return labels.float() if labels.dtype == torch.float64 else labels
    if labels.ndim == 1 and len(labels) and (largest := labels.max().item()) > _MOST_LABELS:
        raise DataError(f"labels: expected whole numbers from 0 to {_MOST_LABELS:,}, got {largest:,}; number them from 0")
    return labels.long()


def split_items(items: Any) -> tuple[ItemInputs, Tensor]:
    """The inputs and the labels of a data set whose items have both: pairs, or mappings with `labels` or `label`."""
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise DataError(f"Examples: expected inputs and labels, or a data set of pairs, got {type(items).__name__} alone")
    if not len(items):
        raise DataError("Examples: expected at least one example, got an empty data set")
    if isinstance(items, Mapping):
        raise DataError("Examples: expected labels beside a mapping of inputs, as in Examples({'input': x}, y)")
    first = _item(items, 0)
    if isinstance(first, Mapping):
        label = next((key for key in _LABELS if key in first), None)
        if label is None:
            raise DataError(f"Examples: expected items with one of {', '.join(_LABELS)}, got {', '.join(map(str, first))}")
        return ItemInputs(items, label=label), labels_of([_number(_item(items, i)[label]) for i in range(len(items))])
    if isinstance(first, (tuple, list)) and len(first) == 2:
        return ItemInputs(items, paired=True), labels_of([_number(_item(items, i)[1]) for i in range(len(items))])
    raise DataError(f"Examples: expected items (input, label) or mappings with a label, got {type(first).__name__}")


def fitted(inputs: Inputs, module: nn.Module) -> Inputs:
    """`inputs` under the names that the module's forward has for them, float64 numbers in the module's own number type."""
    inputs = named(inputs, module)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if isinstance(inputs, FieldInputs):
        return replace(inputs, fields={name: _narrowed(values, dtype) for name, values in inputs.fields.items()})
    if type(inputs) is TensorInputs:
        return replace(inputs, values=_narrowed(inputs.values, dtype))
    return replace(inputs, dtype=dtype) if isinstance(inputs, ItemInputs) else inputs


def _narrowed(values: Any, dtype: torch.dtype | None) -> Any:
    wide = isinstance(values, Tensor) and values.dtype == torch.float64
    return values.to(dtype) if wide and dtype is not None else values


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


_AT_ONCE = 256  # examples that are read together, where all are read


def pieces(inputs: Inputs, most: int | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `inputs`, by name, for a digest: all tensors in memory, and of other inputs at most `most` evenly spaced
    examples (`None`: all).
    """
    if isinstance(inputs, TensorInputs):
        yield inputs.name, inputs.values
    elif isinstance(inputs, FieldInputs):
        yield from sorted(inputs.fields.items())
    else:
        count = len(inputs)
        some = count if most is None else min(most, count)
        chosen = np.unique(np.linspace(0, count - 1, some).astype(int))
        alone = most is not None or isinstance(getattr(inputs, "inputs", inputs), ItemInputs)  # items may differ in shape
        step = 1 if alone else _AT_ONCE
        for index in (chosen[first : first + step] for first in range(0, len(chosen), step)):
            for name, value in sorted(inputs.batch(torch.from_numpy(index)).items()):
                yield (
                    f"{index[0]}/{name}",
                    value if isinstance(value, Tensor) else torch.tensor(list(repr(value).encode()), dtype=torch.uint8),
                )


def _letters(value: Any) -> Tensor:
    """What is no tensor, as the bytes of its text."""
    return torch.tensor(list(repr(value).encode()) or [0], dtype=torch.uint8)


def _tensor(values: Any, name: str) -> Tensor:
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: expected numbers [n, ...], got what makes no tensor ({in_a_line(error)})") from None
    if tensor.layout != torch.strided:
        raise DataError(f"{name}: expected a dense tensor; call to_dense()")
    if not tensor.ndim:
        raise DataError(f"{name}: expected one entry an example [n, ...], got a single number")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise DataError(f"{name}: contain NaN or infinite values; fill or remove those examples")
    return tensor.detach()


def _number(label: Any) -> Any:
    if isinstance(label, Tensor):
        label = label.detach().cpu().numpy()
    return label.item() if isinstance(label, (np.ndarray, np.generic)) and label.size == 1 else label


def _item(items: Any, i: int) -> Any:
    try:
        return items[i]
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"Examples: item {i} of {len(items)} raised {in_a_line(error)}") from error


def _rectangular(rows: Any) -> bool:
    try:
        return np.asarray(rows).dtype.kind in "biuf"
    except ValueError:
        return False


def rows_of(given: Sequence[int] | np.ndarray | Tensor, total: int) -> np.ndarray:
    """Indices of examples as int64 `[n]`, sorted; a mask `[total]` of booleans is read as the examples it marks.

    Raises `DataError` for anything but whole numbers.
    """
    try:
        rows = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    except ValueError as error:
        raise DataError(f"expected whole numbers [n] or a mask of booleans ({in_a_line(error)})") from None
    if rows.dtype == bool and rows.ndim == 1:
        if len(rows) != total:
            raise DataError(f"expected a mask of {total} booleans, one a training example, got {len(rows)}")
        return np.flatnonzero(rows)
    if rows.size == 0:
        return np.zeros(0, dtype=np.int64)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise DataError(f"expected whole numbers [n] or a mask of booleans, got {rows.dtype} of shape {rows.shape}")
    return np.sort(rows.astype(np.int64))
