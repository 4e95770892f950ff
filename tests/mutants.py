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
LEAVES = (("tests/test_privacy_properties.py",),)
CHARGED = (("tests/test_privacy_releases.py",),)
PRIVATE = (
    ("tests/test_grid.py", "tests/test_private_training.py", "tests/test_private_upload.py", "tests/test_privacy_plan.py"),
    ("tests/test_privacy_run.py",),
    *LEAVES,
    *CHARGED,
)
PEOPLE = (("tests/test_private_people.py", "tests/test_private_checks.py", "tests/test_people.py"),)
SITE = (("tests/test_hostile_server.py",),)
CENTRAL = (("tests/test_central_noise.py",),)
DEFENCE = (("tests/test_rounds.py", "tests/test_robust.py", "tests/test_steps.py", "tests/test_coordinates.py"),)
SIDE_BY_SIDE = (("tests/test_forward.py", "tests/test_stacked.py"),)
ATTENTION = (("tests/test_attention.py", "tests/test_packed.py"),)


class Mistake(NamedTuple):
    """In `file`, `right` becomes `wrong`; `stages` are the tests that should tell."""

    name: str
    file: str
    right: str
    wrong: str
    stages: tuple[tuple[str, ...], ...] = STAGES


MISTAKES = (
    # scaling
    Mistake("scaling dropped in products", "algebra/lowrank.py", "w = layer.scaling * torch", "w = 1.0 * torch"),
    Mistake("scaling dropped in averaged factors", "methods/averages.py", "math.sqrt(layer.scaling / scaling) * w[:", "w[:"),
    Mistake("scaling dropped in the SVD share", "methods/products.py", "U * (S / layer.scaling))", "U * S)"),
    Mistake("scaling dropped in the mean of B", "methods/averages.py", "(sent.scaling / layer.scaling)", "1.0"),
    Mistake("download not rescaled", "methods/base.py", "ratio = layer.scaling / scaling", "ratio = 1.0"),
    Mistake(
        "alpha / sqrt(r) for alpha / r",
        "messages/records.py",
        '"standard": alpha / rank',
        '"standard": alpha / math.sqrt(rank)',
    ),
    # weights
    Mistake("off by one in ownership", "methods/parts.py", "torch.arange(rank) < ranks", "torch.arange(rank) <= ranks"),
    Mistake(
        "full denominator in slice weights",
        "methods/parts.py",
        "return owned / owned.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)",
        "return owned",
    ),
    Mistake(
        "weights on both factors",
        "algebra/lowrank.py",
        "return Product.of([Term(layer.B, w, layer.A)])",
        "return Product.of([Term(layer.B, w, (layer.A.T * w).T)])",
    ),
    Mistake("clients weighed alike", "methods/parts.py", "[part.num_examples for part in parts]", "[1 for part in parts]"),
    Mistake("heads weighed alike", "methods/parts.py", "(update.num_examples / total)", "(1 / len(senders))"),
    # singular vectors
    Mistake("one root of S lost", "methods/products.py", "root[:, None] * Vt, U * root)", "Vt, U * root)"),
    Mistake("V for its transpose", "algebra/lowrank.py", "vt if Qr is None else vt @", "vt if Qr is None else vt.flip(-1) @"),
    Mistake("V for U", "algebra/lowrank.py", "else Ql @ u, ", "else Ql @ vt.mT, "),
    Mistake("signs left to chance", "algebra/lowrank.py", "(found.Vt) < 0, -1.0, 1.0)", "(found.Vt) < 0, 1.0, 1.0)"),
    Mistake(
        "smallest singular values first", "algebra/lowrank.py", "S[..., :rank], vt[", "S.flip(-1)[..., :rank], vt.flip(-2)["
    ),
    # slices and ranks
    Mistake("every client given the largest rank", "methods/base.py", "name, client.rank_of(name))", "name, 8)"),
    Mistake("ranks of single layers ignored", "messages/records.py", "self.layer_ranks.get(layer, self.rank)", "self.rank"),
    Mistake("first rows of A with last columns of B", "methods/base.py", "layer.B[:, :kept]", "layer.B[:, -kept:]"),
    Mistake("pad with B that is not zero", "methods/slices.py", "layer.B.new_zeros(layer", "layer.B.new_ones(layer"),
    Mistake("pad with A that is dead", "methods/slices.py", "torch.cat([layer.A, fresh])", "torch.cat([layer.A, 0 * fresh])"),
    Mistake("empty slice zeroed by raFLoRA", "methods/raflora.py", 'if self.empty_slice == "keep"', "if False"),
    Mistake("empty slice zeroed by RBLA", "methods/rbla.py", 'self.empty_slice == "keep" and bool(', "False and bool("),
    Mistake(
        "empty slice zeroed by FFA",
        "methods/averages.py",
        "layer.B.double() * (weights.sum(dim=0) == 0)",
        "0 * layer.B.double()",
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
    Mistake(
        "the base forgets earlier rounds", "methods/products.py", "lowrank.stack([lowrank.of_layer(before), total])", "total"
    ),
    Mistake("the base grows without end", "methods/products.py", "if total.slices * (out + width) > out * width:", "if False:"),
    Mistake(
        "FedEx's residual of the other sign",
        "methods/fedex.py",
        "lowrank.difference(weighted_product(parts, weights), lowrank.of_layer(layer))",
        "lowrank.difference(lowrank.of_layer(layer), weighted_product(parts, weights))",
    ),
    Mistake("RoLoRA's turns swapped", "methods/rolora.py", '"BA"[state.round % 2]', '"AB"[state.round % 2]'),
    Mistake("FedSA hands out one B", "methods/fedsa.py", "(layer.A, own.layers[name].B)", "(layer.A, layer.B)"),
    Mistake("FedSA's B counted as traffic", "messages/records.py", "factors - self.private", "factors"),
    Mistake("HetLoRA weighs by examples", "methods/hetlora.py", "if norms.any()", "if False"),
    Mistake("HetLoRA forgets pruned ranks", "methods/hetlora.py", "if known is not None:", "if False:"),
    Mistake(
        "HetLoRA prunes whatever grew", "training/local.py", "if after[name] < before[name]", "if after[name] > before[name]"
    ),
    Mistake("FLoRIST counts values, not energy", "methods/florist.py", "torch.cumsum(S**2, dim=0)", "torch.cumsum(S, dim=0)"),
    Mistake("LoRA-FAIR's penalty halved", "methods/lora_fair.py", "B @ Q, 2 * penalty", "B @ Q, penalty"),
    Mistake("FedSVD loses S", "methods/fedsvd.py", "svd.Vt, svd.U * svd.S,", "svd.Vt, svd.U,"),
    Mistake("FedSVD's A not at right angles", "methods/fedsvd.py", "basis[known:]", "fresh"),
    # staying put
    Mistake("tau for 1 - tau", "methods/stayput.py", "** self.tau", "** (1 - self.tau)"),
    Mistake("a full denominator whatever tau", "methods/stayput.py", "** self.tau", "** 0"),
    Mistake("the server's slices lost", "methods/stayput.py", "1 - coverage / shared)", "0 * coverage)"),
    Mistake("the server's slices kept whole", "methods/stayput.py", "1 - coverage / shared)", "1 + 0 * coverage)"),
    Mistake(
        "one draw for all",
        "methods/stayput.py",
        "state, name, part.client, part.layer.rank",
        'state, name, "", part.layer.rank',
    ),
    Mistake("the same draw in every round", "methods/slices.py", '"slices", state.round, client', '"slices", client'),
    Mistake("weights in the server's order", "methods/stayput.py", "sent / shared[order]", "sent / shared"),
    Mistake("what is trained also frozen", "methods/slices.py", "range(ranks[name], layer.rank)", "range(layer.rank)"),
    Mistake(
        "a random share for everybody",
        "methods/stayput.py",
        "return super().dispatch(state, client).adapter",
        "return self.dispatch(state, client).adapter",
    ),
    Mistake("momentum back to where it came from", "methods/stayput.py", "-self.momentum)]", "self.momentum)]"),
    Mistake(
        "momentum of the round's own start",
        "methods/stayput.py",
        "replace(state.adapter, tensors={})",
        "replace(after.adapter, tensors={})",
    ),
    # arithmetic, purity, folders, bytes, guard
    Mistake("averages in float32", "methods/averages.py", "(share[rows], part)", "(share[rows], part.float().bfloat16())"),
    Mistake(
        "products in float32", "algebra/lowrank.py", "term.right.double() for term", "term.right.float().double() for term"
    ),
    Mistake("updates not sorted", "methods/base.py", "sorted(updates, key=lambda update: update.client)", "list(updates)"),
    Mistake("averaging in the server's own dictionary", "methods/parts.py", "tensors = dict(previous)", "tensors = previous"),
    Mistake(
        "convolution kernel transposed in the folder",
        "adapter/peft.py",
        "A.unflatten(1, (-1, *layer.kernel))",
        "A.unflatten(1, (-1, *layer.kernel[::-1])).transpose(2, 3)",
    ),
    Mistake(
        "upload counts what is not trained",
        "messages/records.py",
        "self._travelling(adapter or self.adapter, self.train)",
        "self._travelling(adapter or self.adapter, BOTH)",
    ),
    Mistake("NaN let through by the guard", "federation/guard.py", "not torch.isfinite(own).all()", "False"),
    # the fast ways to singular values, and folders read and written layer by layer
    Mistake(
        "left vectors from the right Gram matrix",
        "algebra/subspace.py",
        "gx, gy = _gram(X), _gram(Y.mT)",
        "gx, gy = _gram(Y.mT), _gram(X)",
        FAST,
    ),
    Mistake("half a Gram matrix", "algebra/subspace.py", "    _mirror(gx)\n", "", FAST),
    Mistake("one S lost in the Gram way", "algebra/subspace.py", "S[..., None, :] ** 2", "S[..., None, :]", FAST),
    Mistake("L for its transpose in the core", "algebra/subspace.py", "L = _root(gy).mT", "L = _root(gy)", FAST),
    Mistake("signs of weights lost", "algebra/subspace.py", "w.sign() * _over(root, y)", "_over(root, y)", FAST),
    Mistake(
        "weights left out of the Krylov space",
        "algebra/subspace.py",
        "last = ((basis[..., -thin:].mT @ X) * weights) @ Y",
        "last = (basis[..., -thin:].mT @ X) @ Y",
        FAST,
    ),
    Mistake(
        "one block for a whole Krylov space",
        "algebra/subspace.py",
        "if (missed <= tolerance(X.dtype)).all() or",
        "if True or",
        FAST,
    ),
    Mistake(
        "an error that is always small",
        "algebra/subspace.py",
        "matrix_norm(left)) / _size(S)",
        "matrix_norm(left)) / _size(S) * 1e-8",
        FAST,
    ),
    Mistake(
        "squares that overflow let through",
        "algebra/subspace.py",
        "return fit.all(dim=-1)",
        "return torch.ones_like(fit.all(dim=-1))",
        FAST,
    ),
    Mistake(
        "rounding taken for signal",
        "algebra/subspace.py",
        "return 4 * torch.finfo(dtype).eps",
        "return 0 * torch.finfo(dtype).eps",
        FAST,
    ),
    Mistake(
        "copies of an eigenvalue missed",
        "algebra/subspace.py",
        "(missed <= goal) & _nothing_left(A, basis, least)",
        "missed <= goal",
        FAST,
    ),
    Mistake(
        "one Krylov block for a core",
        "algebra/subspace.py",
        "if (missed <= goal).all() or",
        "missed = 0 * goal\n            if True or",
        FAST,
    ),
    Mistake("layers of a batch swapped", "algebra/lowrank.py", "found |= zip(some, ", "found |= zip(some[::-1], ", FAST),
    Mistake(
        "one layer's fall from the range for all",
        "algebra/subspace.py",
        "masked_fill(~fits, math.inf))\n    if",
        "masked_fill(~fits.all(), math.inf))\n    if",
        FAST,
    ),
    Mistake(
        "a large error not left to QR",
        "algebra/lowrank.py",
        "if error <= enough or",
        "if error < sys.float_info.max or",
        FAST,
    ),
    Mistake(
        "tensors read from the wrong place", "adapter/stored.py", "self._start + begin : self._start + end", "begin:end", FAST
    ),
    Mistake(
        "a misaligned tensor taken as it is", "adapter/stored.py", "% dtype.itemsize == 0 else", "== -1 or True else", FAST
    ),
    Mistake(
        "results that are pages of a file",
        "aggregation/aggregates.py",
        "layer.A.clone(), layer.B.clone()",
        "layer.A, layer.B",
        FAST,
    ),
    Mistake(
        "NaN let through where factors are summed",
        "aggregation/merge.py",
        "if large := overflow(layer):",
        'if large := "":',
        FAST,
    ),
    Mistake(
        "every share at the largest rank",
        "aggregation/merge.py",
        'Client(f"rank-{rank}", rank)',
        'Client(f"rank-{rank}", layer.rank)',
        FAST,
    ),
    Mistake(
        "the last client's number type",
        "aggregation/merge.py",
        "dtype=functools.reduce(torch.promote_types, dtypes)",
        "dtype=dtypes[-1]",
        FAST,
    ),
    Mistake("base models not compared", "aggregation/fitting.py", "if base != named[0][1]", "if False", FAST),
    Mistake(
        "layers held until the end",
        "aggregation/aggregates.py",
        "                self._layer(name, layer, base)\n",
        "                self._layer(name, layer, base)\n"
        "                vars(self).setdefault('kept', []).append(merge._sent(name))\n",
        FAST,
    ),
    Mistake(
        "half-written folders left", "aggregation/aggregates.py", "shutil.rmtree(unfinished, ignore_errors=True)", "pass", FAST
    ),
    Mistake(
        "untrained factors taken from the upload",
        "federation/guard.py",
        'if "A" in download.train else sent.A',
        "if True else sent.A",
    ),
    # privacy
    Mistake(
        "noise without the clip norm",
        "training/private_examples.py",
        "Gaussian(privacy.multiplier(declared), privacy.clip_norm, numbers)",
        "Gaussian(privacy.multiplier(declared), 1.0, numbers)",
        PRIVATE,
    ),
    Mistake(
        "noise divided by the batch twice",
        "training/private_examples.py",
        "noise.added(total.cpu().numpy(), source) / privacy.batch_size",
        "noise.added(total.cpu().numpy() / privacy.batch_size, source) / privacy.batch_size",
        PRIVATE,
    ),
    Mistake(
        "one noise for all numbers of a tensor",
        "privacy/grid.py",
        "draws.standard_normal(values.size)",
        "draws.standard_normal(1).repeat(values.size)",
        PRIVATE,
    ),
    Mistake(
        "noise that is not on the grid",
        "privacy/grid.py",
        "np.rint(normal * (deviation / step))",
        "normal.astype(np.float32) * (deviation / step)",
        PRIVATE,
    ),
    Mistake("a value that is not on the grid", "privacy/grid.py", "whole = np.rint(np.clip(", "whole = (np.clip(", PRIVATE),
    Mistake("a step that follows the value", "privacy/grid.py", "np.frexp(deviation)", "np.frexp(np.abs(values))", PRIVATE),
    Mistake("rounding that nothing makes up for", "privacy/grid.py", "* 2.0**-self.bits)", "* 0.0)", PRIVATE),
    Mistake("large values cut off", "privacy/grid.py", "_LARGEST = 2.0**900", "_LARGEST = 2.0**52", PRIVATE),
    Mistake(
        "divided by what was drawn",
        "training/private_examples.py",
        "/ privacy.batch_size\n",
        "/ max(1.0, float(total.norm()))\n",
        PRIVATE,
    ),
    Mistake(
        "an empty draw is no step",
        "training/private_examples.py",
        "        for parameter, then, total in zip(parameters, start, clipped(sums, draws, rate, turn), strict=True):",
        "        totals = clipped(sums, draws, rate, turn)\n"
        "        if not any(total.any() for total in totals): continue\n"
        "        for parameter, then, total in zip(parameters, start, totals, strict=True):",
        PRIVATE,
    ),
    Mistake(
        "clipped tensor by tensor",
        "training/private_examples.py",
        "scales = clip_norm / squares.sqrt().clamp_min(clip_norm)",
        "scales = clip_norm / (squares / len(gradients)).sqrt().clamp_min(clip_norm)",
        PRIVATE,
    ),
    Mistake(
        "small gradients made larger",
        "training/private_examples.py",
        "scales = clip_norm / squares.sqrt().clamp_min(clip_norm)",
        "scales = clip_norm / squares.sqrt()",
        PRIVATE,
    ),
    Mistake(
        "a gradient that is not finite let through",
        "training/private_examples.py",
        "finite = torch.isfinite(squares)",
        "finite = torch.ones_like(squares, dtype=torch.bool)",
        PRIVATE,
    ),
    Mistake(
        "batches of one size",
        "training/private_examples.py",
        "torch.from_numpy(examples[drawn])",
        "torch.from_numpy(examples[draws.random(len(examples)).argsort()[: mechanism.plan.batch_size]])",
        PRIVATE,
    ),
    Mistake(
        "every example of a person clipped by itself",
        "training/private_people.py",
        "private_examples.clipped_sum(means, clip_norm)",
        "sums.clipped(torch.cat(list(people[start : start + size])), clip_norm)",
        PEOPLE,
    ),
    Mistake(
        "a person's gradients added and not averaged",
        "training/private_people.py",
        "own.sum(dim=0) / counts[person]",
        "own.sum(dim=0)",
        PEOPLE,
    ),
    Mistake(
        "examples drawn and not persons",
        "training/private_people.py",
        "drawn = [people[place] for place in np.flatnonzero(turn & (draws.random(len(people)) < rate))]",
        "drawn = [own for each in people if len(own := each[draws.random(len(each)) < rate])]",
        PEOPLE,
    ),
    Mistake(
        "no bound on what a person contributes",
        "training/private_people.py",
        "if not most or len(examples) <= most:",
        "if True:",
        PEOPLE,
    ),
    Mistake(
        "the first examples of a person in each step",
        "training/private_people.py",
        'np.sort(np.argsort(draws.random(len(examples)), kind="stable")[:most])',
        "np.arange(most)",
        PEOPLE,
    ),
    Mistake(
        "persons counted by their examples",
        "tasks/people.py",
        "counts = np.array([len(each) for each in at], dtype=np.int64)",
        "return shards.sizes",
        PEOPLE,
    ),
    Mistake("a person at several clients", "tasks/people.py", "    if shared:", "    if False:", PEOPLE),
    Mistake("a person who is held out too", "data/people.py", "both = len(set(training) & set(held))", "both = 0", PEOPLE),
    Mistake("nobody is a person", "data/people.py", "    if missing:", "    if False:", PEOPLE),
    Mistake(
        "held out by the order of names",
        "data/people.py",
        "_draw(name) < data.test_fraction for name in set(names)}",
        "place < data.test_fraction * len(set(names)) for place, name in enumerate(sorted(set(names)))}",
        PEOPLE,
    ),
    Mistake(
        "clients named after persons",
        "tasks/dealing.py",
        'if config.privacy.level == "person" and split',
        "if False and split",
        PEOPLE,
    ),
    Mistake("narrow numbers let through", "training/private_checks.py", "_LEAST_BYTES = 4", "_LEAST_BYTES = 1", PEOPLE),
    Mistake(
        "buffers that change let through",
        "training/private_checks.py",
        "if name not in before or not _equal(",
        "if False and not _equal(",
        PEOPLE,
    ),
    Mistake(
        "probed on examples of one length",
        "training/private_examples.py",
        "        first += [int(lengths.argmax()), int(lengths.argmin())]\n",
        "        pass\n",
        PEOPLE,
    ),
    Mistake("the probe passes everything", "training/private_examples.py", "_TOLERANCE = 1e-3", "_TOLERANCE = 1e9", PRIVATE),
    Mistake(
        "noise for one round of the run",
        "privacy/plan.py",
        "whole = plan.spending(declared, plan.max_rounds)",
        "whole = plan.spending(declared, 1)",
        PRIVATE,
    ),
    Mistake(
        "the noise is a little too small",
        "privacy/accountants.py",
        "    while excess(math.log(noise)) > 0:",
        "    noise = round(0.95 * noise, 4)\n    while False:",
        PRIVATE,
    ),
    Mistake(
        "a sampling rate of one round",
        "privacy/plan.py",
        "self.batch_size / declared if",
        "self.batch_size / declared / 2 if",
        PRIVATE,
    ),
    Mistake("one key for all clients", "privacy/noise.py", '{what}\\x1f{place}\\x1f{client}"', '{what}\\x1f{place}"', PRIVATE),
    Mistake("a key cut short", "privacy/noise.py", "hmac.digest(self.key, f", "hmac.digest(self.key[:1], f", PRIVATE),
    Mistake(
        "one noise for every configuration",
        "privacy/noise.py",
        "json.dumps([config, origin], sort_keys=True).encode()",
        'b""',
        PRIVATE,
    ),
    # what leaves: caught by properties of it, in tests that know none of these
    Mistake("same noise every round", "privacy/noise.py", '{what}\\x1f{place}\\x1f{client}"', '{what}\\x1f{client}"', LEAVES),
    Mistake("names run together", "privacy/noise.py", '\\x1f{place}\\x1f{client}"', '{place}{client}"', LEAVES),
    Mistake(
        "least noise of any client for all",
        "training/private_examples.py",
        "Gaussian(privacy.multiplier(declared),",
        "Gaussian(min(map(privacy.multiplier, privacy.noise)),",
        LEAVES,
    ),
    Mistake(
        "a tensor without noise",
        "training/private_examples.py",
        "noisy = noise.added(total.cpu().numpy(), source)",
        "noisy = (noise.added(total.cpu().numpy(), source) if total.ndim > 1 else total.cpu().numpy())",
        LEAVES,
    ),
    Mistake(
        "a layer without noise",
        "training/private_examples.py",
        "noisy = noise.added(total.cpu().numpy(), source)",
        "noisy = noise.added(total.cpu().numpy(), source) if parameter is not parameters[0] else total.numpy()",
        LEAVES,
    ),
    Mistake(
        "all tensors with one noise",
        "training/private_examples.py",
        "noise.added(total.cpu().numpy(), source)",
        "noise.added(total.cpu().numpy(), __import__('copy').deepcopy(source))",
        LEAVES,
    ),
    Mistake(
        "noise of the first step in every step",
        "training/private_examples.py",
        "    for turn, source in mechanism.steps(plan.round, client, declared, units, numbers, draws):\n",
        "    for turn, source in mechanism.steps(plan.round, client, declared, units, numbers, draws):\n"
        "        source = mechanism.draws(plan.round, client)\n",
        LEAVES,
    ),
    Mistake(
        "one sample for all steps",
        "training/private_examples.py",
        "draws.random(len(examples)) < rate",
        "mechanism.draws(plan.round, client).random(len(examples)) < rate",
        LEAVES,
    ),
    Mistake(
        "examples drawn in pairs",
        "training/private_examples.py",
        "draws.random(len(examples)) < rate",
        "np.repeat(draws.random(-(-len(examples) // 2)), 2)[: len(examples)] < rate",
        LEAVES,
    ),
    Mistake(
        "a rate of the exact count",
        "training/private_examples.py",
        "rate, numbers = privacy.sampling_rate(declared)",
        "rate, numbers = privacy.sampling_rate(len(examples))",
        LEAVES,
    ),
    Mistake(
        "the mean gradient's norm for all",
        "training/private_examples.py",
        "scales = clip_norm / squares.sqrt().clamp_min(clip_norm)",
        "scales = clip_norm / squares.mean().sqrt().expand_as(squares).clamp_min(clip_norm)",
        LEAVES,
    ),
    Mistake(
        "a clip of twice the norm",
        "training/private_examples.py",
        "scales = clip_norm / squares.sqrt().clamp_min(clip_norm)",
        "scales = 2 * clip_norm / squares.sqrt().clamp_min(2 * clip_norm)",
        LEAVES,
    ),
    Mistake(
        "one step fewer than is charged, with the noise of all",
        "privacy/noise.py",
        "for _ in range(plan.local_steps))",
        "for _ in range(max(1, plan.local_steps - 1)))",
        LEAVES,
    ),
    Mistake(
        "charged a round late",
        "privacy/ledger.py",
        "        self.books.charge(rows)\n",
        '        due, self.due = getattr(self, "due", []), rows\n        self.books.charge(due)\n',
        CHARGED,
    ),
    Mistake(
        "a charge that is not on disk",
        "files.py",
        "                os.fsync(file.fileno())\n            if not before:",
        "            if not before:",
        CHARGED,
    ),
    Mistake(
        "more noise charged than there is",
        "privacy/ledger.py",
        "**vars(self._more(name, count, round))}",
        '**vars(self._more(name, count, round)), "noise_multiplier": 1 + int(self.plan.noise[count])}',
        CHARGED,
    ),
    Mistake(
        "clients that spent all go on",
        "privacy/ledger.py",
        "return self._spent(client, round - 1) < self.plan.max_rounds",
        "return True",
        CHARGED,
    ),
    Mistake(
        "the least epsilon reported",
        "privacy/ledger.py",
        "max(self.by_client(round).values()",
        "min(self.by_client(round).values()",
        CHARGED,
    ),
    Mistake(
        "the first client's epsilon reported",
        "privacy/ledger.py",
        "max(self.by_client(round).values(), default=0.0)",
        "next(iter(self.by_client(round).values()), 0.0)",
        CHARGED,
    ),
    Mistake(
        "second attempts of secure noise are free",
        "privacy/ledger.py",
        "return len(own) if self.plan.secure else sum(each <= round for each in set(own))",
        "return sum(each <= round for each in set(own))",
        CHARGED,
    ),
    Mistake(
        "uploads above the clip let in",
        "federation/federation.py",
        "return self.privacy.upload_bound if self.privacy else math.inf",
        "return math.inf",
        CHARGED,
    ),
    Mistake(
        "a streams' key of 32 bits", "privacy/noise.py", "int.from_bytes(digest[:16], ", "int.from_bytes(digest[:4], ", LEAVES
    ),
    Mistake(
        "a streams' key of 64 bits", "privacy/noise.py", "int.from_bytes(digest[:16], ", "int.from_bytes(digest[:8], ", LEAVES
    ),
    Mistake(
        "a run's key of 16 bits, written often",
        "privacy/noise.py",
        "return secrets.token_bytes(32)",
        "return secrets.token_bytes(2) * 16",
        LEAVES,
    ),
    Mistake(
        "a worker's key cut short",
        "privacy/noise.py",
        'bytes.fromhex(table["key"]) if',
        'bytes.fromhex(table["key"][:8]) if',
        CHARGED,
    ),
    Mistake(
        "secure noise from a seeded generator",
        "privacy/noise.py",
        "return SystemDraws() if self.key is None",
        "return np.random.default_rng(int.from_bytes(os.urandom(4), 'big')) if self.key is None",
        LEAVES,
    ),
    Mistake("secure noise too small", "privacy/noise.py", "sum(axis=0) / 2", "sum(axis=0) / 2.2", LEAVES),
    Mistake(
        "secure noise of two uniform numbers",
        "privacy/noise.py",
        "(radius * np.cos(2 * np.pi * self.random(4 * size))).reshape(4, size).sum(axis=0) / 2",
        "(self.random(size) - self.random(size)) * 6**0.5 + 0 * radius[:size]",
        LEAVES,
    ),
    Mistake(
        "NumPy's global noise",
        "privacy/grid.py",
        "draws.standard_normal(values.size)",
        "np.random.standard_normal(values.size)",
        LEAVES,
    ),
    Mistake(
        "noise of float32",
        "privacy/grid.py",
        "draws.standard_normal(values.size).reshape",
        "draws.standard_normal(values.size).astype(np.float32).astype(np.float64).reshape",
        LEAVES,
    ),
    Mistake(
        "the sign of noise",
        "privacy/grid.py",
        "draws.standard_normal(values.size).reshape",
        "np.sign(draws.standard_normal(values.size)).reshape",
        LEAVES,
    ),
    Mistake(
        "noise without tails",
        "privacy/grid.py",
        "draws.standard_normal(values.size).reshape",
        "(np.clip(draws.standard_normal(values.size), -2.5, 2.5) * 1.0145).reshape",
        LEAVES,
    ),
    Mistake(
        "half of the numbers, twice",
        "privacy/grid.py",
        "draws.standard_normal(values.size).reshape",
        "np.resize(draws.standard_normal(-(-values.size // 2)), values.size).reshape",
        LEAVES,
    ),
    Mistake(
        "noise that follows the value",
        "privacy/grid.py",
        "draws.standard_normal(values.size).reshape",
        "(draws.standard_normal(values.size) * np.where(values.ravel() > 0, 0.9, 1.09)).reshape",
        LEAVES,
    ),
    Mistake(
        "noise before the clip",
        "training/private_upload.py",
        "        name: torch.from_numpy(noise.added(change.cpu().numpy(), draws)).to(change.device)\n"
        "        for name, change in sorted(_clipped(changes, clip_norm).items())\n    }\n",
        "        name: torch.from_numpy(noise.added(change.cpu().numpy(), draws)).to(change.device)\n"
        "        for name, change in sorted(changes.items())\n    }\n    noisy = _clipped(noisy, clip_norm)\n",
        LEAVES,
    ),
    Mistake(
        "a head as it was trained",
        "training/private_upload.py",
        "(tensor.double() + noisy[name]).to(tensor.dtype) for name",
        "trained.tensors[name] for name",
        LEAVES,
    ),
    Mistake(
        "each tensor with a clip of its own",
        "training/private_upload.py",
        "change * (clip_norm / norm.clamp_min(clip_norm))",
        "change * (clip_norm / change.norm().clamp_min(clip_norm))",
        LEAVES,
    ),
    Mistake(
        "noise by the factor, not by the product",
        "training/private_upload.py",
        "_out(noisy[name], metrics[name], factor))",
        "noisy[name])",
        LEAVES,
    ),
    Mistake("half the noise at the server", "robust/central_noise.py", "Gaussian(largest,", "Gaussian(largest / 2,", LEAVES),
    Mistake(
        "the least noise at the server",
        "robust/central_noise.py",
        "max(plan.noise.values())",
        "min(plan.noise.values())",
        LEAVES,
    ),
    Mistake("the server's noise of round 1", "robust/central_noise.py", 'draws(round, "server")', 'draws(1, "server")', LEAVES),
    Mistake(
        "one factor without the server's noise",
        "robust/central_noise.py",
        "for name, far in sorted(reach.items())}",
        "for name, far in sorted(reach.items())[:1]}",
        LEAVES,
    ),
    Mistake("the mean weight for the largest", "robust/central_noise.py", ".max(dim=0).values", ".mean(dim=0)", LEAVES),
    Mistake(
        "another delta than was asked",
        "privacy/accountants.py",
        "ACCOUNTANTS[accountant](spending, delta)",
        "ACCOUNTANTS[accountant](spending, 1e-3)",
        CHARGED,
    ),
    Mistake(
        "the noise cut to two digits",
        "privacy/accountants.py",
        "    while excess(math.log(noise)) > 0:",
        "    noise = math.floor(100 * noise) / 100\n    while False:",
        CHARGED,
    ),
    Mistake(
        "noise for the count itself",
        "privacy/plan.py",
        "counts = sorted({declare(int(size), asked.counts) for size in sizes})",
        "counts = sorted({int(size) for size in sizes} | {declare(int(size), asked.counts) for size in sizes})",
        CHARGED,
    ),
    Mistake(
        "max_rounds of the plan ignored",
        "privacy/plan.py",
        "max_rounds = min(asked.max_rounds or config.run.rounds, config.run.rounds)",
        "max_rounds = asked.max_rounds or 1",
        CHARGED,
    ),
    # a site's own budget, against a hostile server
    Mistake(
        "site: charged after the training",
        "worker/site.py",
        "        charge = self.grant.charge(release, about)\n        try:\n            made = self._made(held, job, plan)\n",
        "        charge = 0\n"
        "        try:\n"
        "            made = self._made(held, job, plan)\n"
        "            charge = self.grant.charge(release, about)\n",
        SITE,
    ),
    Mistake(
        "site: new noise for an old request, at no charge",
        "worker/site.py",
        (
            "        if stored is not None:\n"
            "            return from_bytes(stored, len(stored))\n"
            "        self.store.check_room(job.download.upload_bytes())"
            "  # a charge whose reply cannot be kept would be spent for nothing\n"
            "        privacy = held.privacy\n"
            "        spending = privacy.spending(held.declared, 1)\n"
            "        release = Release(privacy.level, spending.sampling_rate, spending.noise_multiplier, spending.steps)\n"
            '        about = {"run": held.run[:100], "key": held.key, "round": plan.round, "request": request}\n'
            "        charge = self.grant.charge(release, about)\n"
        ),
        (
            "        self.store.check_room(job.download.upload_bytes())"
            "  # a charge whose reply cannot be kept would be spent for nothing\n"
            "        privacy = held.privacy\n"
            "        spending = privacy.spending(held.declared, 1)\n"
            "        release = Release(privacy.level, spending.sampling_rate, spending.noise_multiplier, spending.steps)\n"
            '        about = {"run": held.run[:100], "key": held.key, "round": plan.round, "request": request}\n'
            "        charge = self.grant.count if stored is not None else self.grant.charge(release, about)\n"
        ),
        SITE,
    ),
    Mistake(
        "site: a request known by its round alone",
        "worker/site.py",
        "to_bytes(cohort), to_bytes(download)):",
        "str(download.header.round).encode()):",
        SITE,
    ),
    Mistake(
        "site: a budget for each run",
        "worker/site.py",
        '        self.log.write("ready"',
        "        own, asked = self.store._run(held.key), self.site.privacy\n"
        "        own.mkdir(exist_ok=True)\n"
        "        self.grant = Grant(own, asked.level, asked.epsilon, asked.delta)\n"
        '        self.log.write("ready"',
        SITE,
    ),
    Mistake(
        "site: charges of other noise forgotten",
        "privacy/grant.py",
        "count in steps.items():",
        "count in list(steps.items())[-1:]:",
        SITE,
    ),
    Mistake(
        "site: charges before the start forgotten",
        "privacy/chain.py",
        "            self._take(row, line)\n        if not",
        '            self.count, self._last = row["number"], _digest(line)\n        if not',
        SITE,
    ),
    Mistake(
        "site: one release too many", "privacy/grant.py", "after = self._spendings(release)", "after = self._spendings()", SITE
    ),
    Mistake(
        "site: noise that can be drawn again",
        "worker/site.py",
        "Mechanism(held.privacy)",
        'Mechanism(held.privacy, b"0" * 32)',
        SITE,
    ),
    Mistake("site: a line changed in the ledger", "privacy/chain.py", ' or row["before"] != digests[-1]', "", SITE),
    Mistake("site: an older ledger", "privacy/chain.py", ' or len(lines) - head["charges"] > 1', "", SITE),
    Mistake("site: an older copy of both files", "worker/store.py", "if answered > charges:", "if False:", SITE),
    Mistake(
        "site: half the noise for a whole site taken as all",
        "privacy/grant.py",
        "(rate, noise) if level == unit else (1.0, noise / 2)",
        "rate, noise",
        SITE,
    ),
    Mistake(
        "site: figures beside the release",
        "worker/site.py",
        "bare = ClientUpdate(reply.adapter, held.declared, self.site.name)",
        'bare = dataclasses.replace(reply, metrics={"seconds": 1.0})',
        SITE,
    ),
    Mistake(
        "site: the plan taken on trust",
        "worker/site.py",
        "        sitechecks.check_plan(held.config, plan, wanted.train)\n",
        "",
        SITE,
    ),
    Mistake(
        "site: the download taken on trust",
        "worker/site.py",
        "        sitechecks.check_download(job.download, form)\n",
        "",
        SITE,
    ),
    Mistake(
        "site: any level of privacy",
        "worker/sitechecks.py",
        'expect(asked.level == own.level, "privacy.level", own.level, asked.level)',
        "pass",
        SITE,
    ),
    Mistake(
        "training that is not charged",
        "federation/asking.py",
        "    ledger.charge(round, {job.client.name: job.num_examples for job in left})\n",
        "",
        PRIVATE,
    ),
    Mistake(
        "an interrupted round charged twice",
        "privacy/ledger.py",
        "if self.plan.secure or not self._has(name, round)",
        "if True",
        PRIVATE,
    ),
    Mistake("the system's noise charged once", "privacy/ledger.py", "len(own) if self.plan.secure else sum(", "sum(", PRIVATE),
    Mistake(
        "a budget of one round too many",
        "privacy/ledger.py",
        "round - 1) < self.plan.max_rounds",
        "round - 1) <= self.plan.max_rounds",
        PRIVATE,
    ),
    Mistake(
        "upload clipped by the factor's norm",
        "training/private_upload.py",
        "gram = layer.scaling**2 * fixed @ fixed.T",
        "gram = torch.eye(layer.rank, dtype=torch.float64)",
        PRIVATE,
    ),
    Mistake(
        "scaling dropped in the product's norm",
        "training/private_upload.py",
        "gram = layer.scaling**2 * fixed",
        "gram = fixed",
        PRIVATE,
    ),
    Mistake(
        "upload noise without the clip norm",
        "training/private_upload.py",
        "Gaussian(noise_multiplier, clip_norm, sum(",
        "Gaussian(noise_multiplier, 1.0, sum(",
        PRIVATE,
    ),
    Mistake(
        "upload noise not brought back",
        "training/private_upload.py",
        "_out(noisy[name], metrics[name], factor)",
        "noisy[name]",
        PRIVATE,
    ),
    # noise at the server
    Mistake("central noise by the mean weight", "robust/central_noise.py", ".max(dim=0).values", ".mean(dim=0)", CENTRAL),
    Mistake(
        "central noise by one weight for all",
        "robust/central_noise.py",
        "method.weights(parts, layer.rank)",
        "torch.full((1, layer.rank), 1 / len(parts))",
        CENTRAL,
    ),
    Mistake(
        "scaling dropped in the noise on A",
        "robust/central_noise.py",
        'largest[:, None] / unit["A"]',
        "largest[:, None]",
        CENTRAL,
    ),
    Mistake(
        "scaling dropped in the noise on B",
        "robust/central_noise.py",
        'largest[None, :] / unit["B"]',
        "largest[None, :]",
        CENTRAL,
    ),
    Mistake(
        "central noise without the clip norm",
        "robust/central_noise.py",
        "Gaussian(largest, plan.clip_norm,",
        "Gaussian(largest, 1.0,",
        CENTRAL,
    ),
    Mistake(
        "no noise on the head", "robust/central_noise.py", "_noisy(tensor, reach.tensors, noise, draws)", "tensor", CENTRAL
    ),
    Mistake("the head's noise by the mean", "robust/central_noise.py", "max(counts) / sum(counts)", "1 / len(counts)", CENTRAL),
    Mistake(
        "who failed leaves the mean",
        "robust/central_noise.py",
        "Screened(complete(jobs, updates))",
        "Screened(list(updates))",
        CENTRAL,
    ),
    Mistake(
        "more than the noised mean goes on",
        "robust/central_noise.py",
        "replace(state, round=round, adapter=_typed(",
        "replace(method.aggregate(state, updates), adapter=_typed(",
        CENTRAL,
    ),
    Mistake(
        "the mean rounded before its noise",
        "robust/central_noise.py",
        "method.aggregate(_wide(state), ",
        "method.aggregate(state, ",
        CENTRAL,
    ),
    Mistake(
        "the head's mean rounded before its noise",
        "robust/central_noise.py",
        "[_wide_update(update) for update in updates]",
        "updates",
        CENTRAL,
    ),
    Mistake("a download that does not say its rescaling", "methods/base.py", ", rescale=self.rescale)", ")", CENTRAL),
    Mistake("scaling dropped in the clip", "messages/change.py", "unit[factor] * _size(", "_size(", CENTRAL),
    Mistake(
        "the head left out of the clip",
        "messages/change.py",
        "*(_size(adapter.tensors[name], tensor) for name, tensor in before.tensors.items())",
        "0.0",
        CENTRAL,
    ),
    Mistake("rounding past the clip", "messages/change.py", "share *= _SHORTER", "break", CENTRAL),
    Mistake(
        "unclipped uploads believed", "federation/guard.py", "not change.norm(download, believed) <= bound", "False", CENTRAL
    ),
    Mistake(
        "the server's noise is the same in each run",
        "robust/central_noise.py",
        'self.mechanism.draws(round, "server")',
        "__import__('numpy').random.default_rng(round)",
        CENTRAL,
    ),
    # limits on one client, and rounds that end
    Mistake(
        "a single owner has all of the weight", "robust/owners.py", "owners[name][j] == 1", "owners[name][j] == 0", DEFENCE
    ),
    Mistake("factors of any length", "robust/norm_bound.py", " and self.change <= bounds.change", "", DEFENCE),
    Mistake("far updates are shortened alone", "robust/norm_bound.py", "if self.far and", "if False and", DEFENCE),
    Mistake(
        "the longest step instead of the median", "robust/norm_bound.py", "statistics.median(column)", "max(column)", DEFENCE
    ),
    Mistake("no further for more steps", "robust/norm_bound.py", "max(1.0, reach / usual_reach)", "1.0", DEFENCE),
    Mistake("what stays with a client is moved", "robust/norm_bound.py", 'if "B" in moves else after.B', "", DEFENCE),
    Mistake(
        "a quorum of one less",
        "federation/quorum.py",
        "usable >= self.needed(asked)",
        "usable + 1 >= self.needed(asked)",
        DEFENCE,
    ),
    Mistake(
        "patience without an end",
        "federation/quorum.py",
        "now = replace(self, idle=self.idle + 1 if idle else 0)",
        "now = self",
        DEFENCE,
    ),
    Mistake("a rest of one round less", "federation/quarantine.py", "round + self._rest)", "round + self._rest - 1)", DEFENCE),
    Mistake("late replies are forgotten", "federation/late.py", "return held if carried else {}", "return {}", DEFENCE),
    Mistake("nothing is trimmed", "robust/coordinates.py", "numbers[..., cut : count - cut]", "numbers[...]", DEFENCE),
    Mistake("Krum by all distances", "robust/krum.py", "[:, :nearest]", "[:, :]", DEFENCE),
    Mistake(
        "the mean instead of the median", "robust/geometric_median.py", "shares / away.clamp_min(floor)", "shares", DEFENCE
    ),
    # clients side by side
    Mistake(
        "scaling dropped in the pass",
        "training/forward.py",
        "add(output, module, input, A, B * scaling)",
        "add(output, module, input, A, B)",
        SIDE_BY_SIDE,
    ),
    Mistake("scaling dropped in the weight", "training/forward.py", "weight + B * scaling @ A", "weight + B @ A", SIDE_BY_SIDE),
    Mistake(
        "one client's weight left behind", "training/lora.py", "            own.clear()\n", "            pass\n", SIDE_BY_SIDE
    ),
    Mistake(
        "what fills up a batch is trained",
        "training/stacked.py",
        "(torch.arange(longest) < lengths) / lengths",
        "torch.ones(len(chosen), longest) / longest",
        SIDE_BY_SIDE,
    ),
    Mistake("a sum in the base for nobody", "training/stacked.py", ", self._in_base(name))", ")", SIDE_BY_SIDE),
    Mistake(
        "scaling dropped in the kernel", "training/forward.py", "kernels + B * scaling @ A", "kernels + B @ A", SIDE_BY_SIDE
    ),
    # attention over real tokens
    Mistake("attention to padding", "tasks/text/attention.py", "np.float32(-np.inf)", "np.float32(0)", ATTENTION),
    Mistake(
        "gradients from padding", "tasks/text/attention.py", "block.take(rows).mul_(block.real)", "block.take(rows)", ATTENTION
    ),
    Mistake("scores without their scale", "tasks/text/attention.py", "alpha=Q.shape[2] ** -0.5", "alpha=1.0", ATTENTION),
    Mistake("heads of one text mixed", "tasks/text/attention.py", "[:, None] * heads + head)", "[:, None] * heads)", ATTENTION),
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
