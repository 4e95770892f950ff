"""Plants known mistakes in a copy of the package, one at a time, and asks the suite to find each: `python tests/mutants.py`.

Most of them were seen in released implementations of these methods. A mistake is a piece of text that stands exactly once
in its file, and what it becomes. Words on the command line choose mistakes by their names. The exit status is 1 when one
is not caught, when a text is not there any more, or when the unchanged package fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# The part of the suite that speaks of methods, generic properties first: the table then names the property that was broken.
# What needs PEFT comes in a second run, which most mistakes never reach.
STAGES = (
    (
        "tests/conformance/test_traits.py",
        "tests/conformance/test_rounds.py",
        "tests/test_guard.py",
        "tests/test_lowrank.py",
        "tests/methods",
    ),
    ("tests/conformance/test_applied.py",),
)


FAST = (("tests/test_subspace.py", "tests/test_folders.py"),)


class Mistake(NamedTuple):
    """In `file`, `right` becomes `wrong`; `stages` are the tests that should tell."""

    name: str
    file: str
    right: str
    wrong: str
    stages: tuple[tuple[str, ...], ...] = STAGES


MISTAKES = (
    # scaling
    Mistake("scaling dropped in products", "lowrank.py", "w = layer.scaling * torch", "w = 1.0 * torch"),
    Mistake("scaling dropped in averaged factors", "methods/base.py", "math.sqrt(layer.scaling) * w[:", "w[:"),
    Mistake("scaling dropped in the SVD share", "methods/base.py", "U * (S / layer.scaling))", "U * S)"),
    Mistake("scaling dropped in the mean of B", "methods/base.py", "(sent.scaling / layer.scaling)", "1.0"),
    Mistake("download not rescaled", "methods/base.py", "ratio = layer.scaling / scaling", "ratio = 1.0"),
    Mistake("alpha / sqrt(r) for alpha / r", "records.py", '"standard": alpha / rank', '"standard": alpha / math.sqrt(rank)'),
    # weights
    Mistake("off by one in ownership", "methods/base.py", "torch.arange(rank) < ranks", "torch.arange(rank) <= ranks"),
    Mistake(
        "full denominator in slice weights",
        "methods/base.py",
        "return owned / owned.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)",
        "return owned",
    ),
    Mistake(
        "weights on both factors",
        "lowrank.py",
        "return Product.of([Term(layer.B, w, layer.A)])",
        "return Product.of([Term(layer.B, w, (layer.A.T * w).T)])",
    ),
    Mistake("clients weighed alike", "methods/base.py", "[part.num_examples for part in parts]", "[1 for part in parts]"),
    Mistake("heads weighed alike", "methods/base.py", "(update.num_examples / total)", "(1 / len(senders))"),
    # singular vectors
    Mistake("one root of S lost", "methods/base.py", "root[:, None] * Vt, U * root)", "Vt, U * root)"),
    Mistake("V for its transpose", "lowrank.py", "vt[:keep] @ Qr.T", "vt.T[:keep] @ Qr.T"),
    Mistake("V for U", "lowrank.py", "Ql @ u[:, :keep]", "Ql @ vt[:keep].T"),
    Mistake("signs left to chance", "lowrank.py", "torch.where(peak < 0, -1.0, 1.0)", "torch.ones_like(peak)"),
    Mistake("smallest singular values first", "lowrank.py", "S[:keep], vt[:keep]", "S.flip(0)[:keep], vt.flip(0)[:keep]"),
    # slices and ranks
    Mistake("every client given the largest rank", "methods/base.py", "name, client.rank_of(name))", "name, 8)"),
    Mistake("ranks of single layers ignored", "records.py", "self.layer_ranks.get(layer, self.rank)", "self.rank"),
    Mistake("first rows of A with last columns of B", "methods/base.py", "layer.B[:, :kept]", "layer.B[:, -kept:]"),
    Mistake("pad with B that is not zero", "methods/base.py", "layer.B.new_zeros(", "layer.B.new_ones("),
    Mistake("pad with A that is dead", "methods/base.py", "torch.cat([layer.A, fresh])", "torch.cat([layer.A, 0 * fresh])"),
    Mistake("empty slice zeroed by raFLoRA", "methods/raflora.py", 'if self.empty_slice == "keep"', "if False"),
    Mistake("empty slice zeroed by RBLA", "methods/rbla.py", 'previous if self.empty_slice == "keep" else None', "None"),
    Mistake(
        "empty slice zeroed by FFA", "methods/base.py", "layer.B.double() * (weights.sum(dim=0) == 0)", "0 * layer.B.double()"
    ),
    # FFA-LoRA
    Mistake("B frozen instead of A", "methods/ffa_lora.py", 'train = frozenset({"B"})', 'train = frozenset({"A"})'),
    Mistake(
        "A of FFA drawn anew each round",
        "methods/ffa_lora.py",
        "return layer.with_factors(layer.A, mean_b(state, name, parts))",
        'A = init_a(layer.rank, layer, keys.generator(state.seed, "a", state.round))\n'
        "        return layer.with_factors(A, mean_b(state, name, parts))",
    ),
    # the other methods
    Mistake("the base forgets earlier rounds", "methods/base.py", "lowrank.stack([lowrank.of_layer(before), total])", "total"),
    Mistake(
        "the base grows without end", "methods/base.py", "if total.slices * (out + width) > out * width:", "if False:"
    ),
    Mistake(
        "FedEx's residual of the other sign",
        "methods/fedex.py",
        "lowrank.difference(weighted_product(parts, weights), lowrank.of_layer(layer))",
        "lowrank.difference(lowrank.of_layer(layer), weighted_product(parts, weights))",
    ),
    Mistake("RoLoRA's turns swapped", "methods/rolora.py", '"BA"[state.round % 2]', '"AB"[state.round % 2]'),
    Mistake("FedSA hands out one B", "methods/fedsa.py", "(layer.A, own.layers[name].B)", "(layer.A, layer.B)"),
    Mistake("FedSA's B counted as traffic", "records.py", "factors - self.private", "factors"),
    Mistake("HetLoRA weighs by examples", "methods/hetlora.py", "if norms.any()", "if False"),
    Mistake("HetLoRA forgets pruned ranks", "methods/hetlora.py", "if known is not None:", "if False:"),
    Mistake("HetLoRA prunes whatever grew", "local.py", "if after[name] < before[name]", "if after[name] > before[name]"),
    Mistake("FLoRIST counts values, not energy", "methods/florist.py", "torch.cumsum(S**2, dim=0)", "torch.cumsum(S, dim=0)"),
    Mistake("LoRA-FAIR's penalty halved", "methods/lora_fair.py", "B @ Q, 2 * penalty", "B @ Q, penalty"),
    Mistake("FedSVD loses S", "methods/fedsvd.py", "_complete(layer, Vt, U * S,", "_complete(layer, Vt, U,"),
    Mistake("FedSVD's A not at right angles", "methods/fedsvd.py", "basis[known:]", "fresh"),
    # arithmetic, purity, folders, bytes, guard
    Mistake("averages in float32", "methods/base.py", "w[:, None], layer.A)", "w[:, None], layer.A.float().bfloat16())"),
    Mistake("products in float32", "lowrank.py", "term.right.double() for term", "term.right.float().double() for term"),
    Mistake("updates not sorted", "methods/base.py", "sorted(updates, key=lambda update: update.client)", "list(updates)"),
    Mistake("averaging in the server's own dictionary", "methods/base.py", "tensors = dict(previous)", "tensors = previous"),
    Mistake(
        "convolution kernel transposed in the folder",
        "adapter.py",
        "A.unflatten(1, (-1, *layer.kernel))",
        "A.unflatten(1, (-1, *layer.kernel[::-1])).transpose(2, 3)",
    ),
    Mistake(
        "upload counts what is not trained",
        "records.py",
        "self._travelling(adapter or self.adapter, self.train)",
        "self._travelling(adapter or self.adapter, BOTH)",
    ),
    Mistake("NaN let through by the guard", "guard.py", "if not torch.isfinite(got).all()", "if False"),
    # the fast ways to singular values, and folders read and written layer by layer
    Mistake(
        "left vectors from the right Gram matrix",
        "subspace.py",
        "gx, gy = _gram(X), _gram(Y.T)",
        "gx, gy = _gram(Y.T), _gram(X)",
        FAST,
    ),
    Mistake("half a Gram matrix", "subspace.py", "gx.triu_().add_(gx.triu(1).T)", "gx.triu_()", FAST),
    Mistake("one S lost in the Gram way", "subspace.py", "(on_right[:, :keep] / S**2)", "(on_right[:, :keep] / S)", FAST),
    Mistake("L for its transpose in the core", "subspace.py", "    L = R.T\n", "    L = R\n", FAST),
    Mistake("signs of weights lost", "subspace.py", "w.sign() * _over(root, y)", "_over(root, y)", FAST),
    Mistake(
        "weights left out of the Krylov space",
        "subspace.py",
        "last = ((basis[:, -thin:].T @ X) * weights) @ Y",
        "last = (basis[:, -thin:].T @ X) @ Y",
        FAST,
    ),
    Mistake("one block for a whole Krylov space", "subspace.py", "if missed <= tolerance(X.dtype) or", "if True or", FAST),
    Mistake(
        "an error that is always small", "subspace.py", "return largest / _size(S)", "return 1e-8 * largest / _size(S)", FAST
    ),
    Mistake(
        "squares that overflow let through",
        "subspace.py",
        "return bool(torch.isfinite(norms).all()) and",
        "return True or",
        FAST,
    ),
    Mistake(
        "rounding taken for signal",
        "subspace.py",
        "return 4 * torch.finfo(dtype).eps",
        "return 0 * torch.finfo(dtype).eps",
        FAST,
    ),
    Mistake(
        "a large error not left to QR",
        "lowrank.py",
        'if found is None or (algebra == "auto" and found.error > subspace.tolerance(X.dtype)):',
        "if found is None:",
        FAST,
    ),
    Mistake("tensors read from the wrong place", "folders.py", "file.seek(self._start + begin)", "file.seek(begin)", FAST),
    Mistake(
        "a short read let through",
        "folders.py",
        "file.readinto(memoryview(buffer)) != len(buffer)",
        "not file.readinto(memoryview(buffer))",
        FAST,
    ),
    Mistake(
        "every share at the largest rank",
        "merging.py",
        'Client(f"rank-{rank}", rank)',
        'Client(f"rank-{rank}", layer.rank)',
        FAST,
    ),
    Mistake(
        "the last client's number type",
        "merging.py",
        "dtype=functools.reduce(torch.promote_types, dtypes)",
        "dtype=dtypes[-1]",
        FAST,
    ),
    Mistake("base models not compared", "merging.py", "if base != named[0][1]", "if False", FAST),
    Mistake(
        "layers held until the end",
        "aggregation.py",
        "            layer, base = merge.layer(name)\n",
        "            layer, base = merge.layer(name)\n"
        "            vars(self).setdefault('kept', []).append(merge._sent(name))\n",
        FAST,
    ),
    Mistake("half-written folders left", "aggregation.py", "shutil.rmtree(unfinished, ignore_errors=True)", "pass", FAST),
    Mistake(
        "untrained factors taken from the upload", "guard.py", 'if "A" in download.train else sent.A', "if True else sent.A"
    ),
)


@contextmanager
def copied_package(mistake: Mistake | None) -> Iterator[Path]:
    """A folder with a copy of the package in it, the mistake planted."""
    with tempfile.TemporaryDirectory(prefix="anyrank-mutant-") as folder:
        package = Path(folder) / "anyrank"
        shutil.copytree(ROOT / "src" / "anyrank", package, ignore=shutil.ignore_patterns("__pycache__"))
        if mistake:
            path = package / mistake.file
            text = path.read_text()
            if text.count(mistake.right) != 1:
                raise LookupError(f"{mistake.file}: expected {mistake.right!r} once, found {text.count(mistake.right)} times")
            path.write_text(text.replace(mistake.right, mistake.wrong))
        yield Path(folder)


def suite(folder: Path, stages: tuple[tuple[str, ...], ...]) -> tuple[int, str]:
    """Run `stages` against the package in `folder` up to the first failure: pytest's exit status and its output."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    imported = subprocess.run(
        [sys.executable, "-c", "import anyrank; print(anyrank.__file__)"], env=environment, capture_output=True, text=True
    )
    if not imported.stdout.startswith(str(folder)):
        return 2, f"the copy is not what is imported: {imported.stdout or imported.stderr}"
    for tests in stages:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "--no-header", *tests]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            break
    return done.returncode, done.stdout + done.stderr


def verdict(mistake: Mistake) -> tuple[bool, str]:
    """Whether the suite caught the mistake, and by which test."""
    try:
        with copied_package(mistake) as folder:
            status, output = suite(folder, mistake.stages)
    except LookupError as error:
        return False, f"OUT OF DATE: {error}"
    failed = re.search(r"^FAILED tests/(.*?)(?: - (.*))?$", output, re.MULTILINE)
    # A package that cannot run at all is a badly planted mistake, not a caught one.
    if status == 1 and failed and not re.match(r"(NameError|SyntaxError|ImportError|UnboundLocalError)", failed[2] or ""):
        return True, failed[1]
    return False, "NOT CAUGHT" if status == 0 else f"BROKEN: {failed[2] if failed else output.strip().splitlines()[-1]}"


def main(words: list[str]) -> int:
    chosen = [mistake for mistake in MISTAKES if not words or any(word in mistake.name for word in words)]
    with copied_package(None) as folder:
        status, output = suite(folder, (*STAGES, *FAST))
    if status:
        print(f"the unchanged package fails, so nothing can be told of mistakes:\n{output}")
        return 1
    caught = 0
    width = max(len(mistake.name) for mistake in chosen)
    for mistake in chosen:
        began = time.perf_counter()
        found, by = verdict(mistake)
        caught += found
        print(f"{mistake.name:<{width}}  {by}  ({time.perf_counter() - began:.0f} s)", flush=True)
    print(f"{caught} of {len(chosen)} mistakes caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
