"""Secure summation by other libraries: is the sum right, what if a site drops out, what does the server learn, at what cost.

    pip install nvflare==2.9.0 tenseal==0.3.18 && python benchmarks/summation.py tenseal
    pip install flwr==1.42.0                   && python benchmarks/summation.py flower
    pip install declearn==2.9.1 gmpy2          && python benchmarks/summation.py declearn
    pip install fedbiomed==6.4.1               && python benchmarks/summation.py fedbiomed

Each in an environment of its own: their pins clash. anyrank is not needed. Sites of ranks 4, 8, 8 and 16 send one layer of 1024
inputs: slices 1 to 4 have four owners, 5 to 8 three, 9 to 16 one. Each group of slices is a sum of its own. Seeds of numbers
are fixed, keys are not. docs/secure-summation.md says what came out.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

WIDTH, MB = 1024, 1_000_000
RANKS, COUNTS = {1: 4, 2: 8, 3: 8, 4: 16}, {1: 100, 2: 250, 3: 37, 4: 400}
GROUPS = ((0, 4), (4, 8), (8, 16))  # slices that the same sites own


def factors() -> dict[int, np.ndarray]:
    draw = np.random.default_rng(0)
    return {site: draw.normal(0, 0.02, (rank, WIDTH)).astype(np.float32) for site, rank in RANKS.items()}


def owners(start: int, sites: Sequence[int]) -> list[int]:
    return [site for site in sites if RANKS[site] > start]


def plain(held: dict[int, np.ndarray], start: int, stop: int, sites: Sequence[int]) -> np.ndarray:
    """The mean over the owners, weighted by examples, as rbla has it."""
    total = sum(COUNTS[site] * held[site][start:stop].astype(np.float64) for site in sites)
    return total / sum(COUNTS[site] for site in sites)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def say(what: str, found: object) -> None:
    print(f"{what:<78} {found}", flush=True)


def peak() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"


# --- homomorphic encryption, as NVFlare provisions it ------------------------------------------------------------------


def tenseal() -> None:
    import tenseal as ts
    from nvflare.lighter.impl.he import HEBuilder

    builder = HEBuilder()
    builder.initialize(None, None)
    site = ts.context_from(builder.get_serialized_context(is_client=True))
    server = ts.context_from(builder.get_serialized_context())
    held = factors()
    for start, stop in GROUPS:
        own = owners(start, list(RANKS))
        sent = {s: ts.ckks_vector(site, (held[s][start:stop].astype(np.float64) * COUNTS[s]).ravel()).serialize() for s in own}
        total = sum((ts.ckks_vector_from(server, sent[s]) for s in own[1:]), ts.ckks_vector_from(server, sent[own[0]]))
        read = ts.ckks_vector_from(site, total.serialize()).decrypt()
        mean = np.reshape(read, (stop - start, WIDTH)) / sum(COUNTS[s] for s in own)
        say(
            f"slices {start + 1} to {stop}, {len(own)} owners: largest error of the mean",
            f"{_far(mean, held, start, stop, own):.1e}",
        )
    say("the server decrypts", _refusal(total.decrypt))
    other = np.reshape(ts.ckks_vector_from(site, sent[4]).decrypt(), (8, WIDTH)) / COUNTS[4]
    say("any site that gets the upload of another one reads it, to", f"{np.abs(other - held[4][8:]).max():.1e}")
    long, short = (ts.ckks_vector(site, held[s].astype(np.float64).ravel()) for s in (4, 1))
    say("uploads of rank 16 and rank 4 added as they are", _refusal(lambda: long + short))
    values = np.random.default_rng(1).normal(0, 0.02, 6 * MB)
    vector, seconds = timed(lambda: ts.ckks_vector(site, values))
    wire, packing = timed(vector.serialize)
    del vector
    there, unpacking = timed(lambda: ts.ckks_vector_from(server, wire))
    _, adding = timed(lambda: there + there)
    ours = ts.ckks_vector_from(site, wire)
    _, reading = timed(ours.decrypt)
    say("an adapter of 24 MB: encrypt and pack, at the site", f"{seconds + packing:.1f} s, {len(wire) / MB:.0f} MB on the wire")
    say("  unpack and add, at the server, for each site", f"{unpacking + adding:.1f} s")
    say("  decrypt the sum, at each site", f"{reading:.1f} s")
    say("  peak memory of this process, which is site and server", peak())


def _far(mean: np.ndarray, held: dict[int, np.ndarray], start: int, stop: int, own: Sequence[int]) -> float:
    return float(np.abs(mean - plain(held, start, stop, own)).max())


def _refusal(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"refused ({type(error).__name__})"
    return "done"


# --- Flower's SecAgg+ -------------------------------------------------------------------------------------------------

MOD, TARGET, CLIP, MOST = 1 << 32, 1 << 22, 8.0, 1000.0  # Flower's defaults


class Flower:
    """The functions of Flower's client, and the steps of its server workflow, without network."""

    def __init__(self, threshold: int = 2) -> None:
        from flwr.client.mod import secaggplus_mod  # noqa: F401  (loads the module of the next line)
        from flwr.common.secure_aggregation.crypto.shamir import combine_shares
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
        from flwr.common.secure_aggregation.quantization import dequantize
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

        self.client = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
        self.combine, self.shared, self.dequantize, self.mask = combine_shares, generate_shared_key, dequantize, pseudo_rand_gen
        self.threshold = threshold

    def keys(self, sites: Sequence[int]) -> None:
        asked = {"sample_num": len(sites), "share_num": len(sites), "threshold": self.threshold}
        asked |= {"clipping_range": CLIP, "target_range": TARGET, "mod_range": MOD, "max_weight": MOST}
        from flwr.common.secure_aggregation.secaggplus_constants import Key

        self.key, self.states, self.public = Key, {}, {}
        names = (Key.SAMPLE_NUMBER, Key.SHARE_NUMBER, Key.THRESHOLD, Key.CLIPPING_RANGE, Key.TARGET_RANGE, Key.MOD_RANGE)
        config = dict(zip((*names, Key.MAX_WEIGHT), asked.values(), strict=True))
        for site in sites:
            self.states[site] = state = self.client.SecAggPlusState()
            state.nid = site
            found = self.client._setup(state, config)
            self.public[site] = [found[Key.PUBLIC_KEY_1], found[Key.PUBLIC_KEY_2]]
        self.mail: dict[int, tuple[list[int], list[bytes]]] = {site: ([], []) for site in sites}
        for site, state in self.states.items():
            found = self.client._share_keys(state, {str(name): keys for name, keys in self.public.items()})
            for to, text in zip(found[Key.DESTINATION_LIST], found[Key.CIPHERTEXT_LIST], strict=True):
                self.mail[to][0].append(site)
                self.mail[to][1].append(text)

    def masked(self, site: int, values: np.ndarray) -> list[np.ndarray]:
        from flwr.common import bytes_to_ndarray, ndarrays_to_parameters

        mail = {self.key.SOURCE_LIST: self.mail[site][0], self.key.CIPHERTEXT_LIST: self.mail[site][1]}
        found = self.client._collect_masked_vectors(self.states[site], mail, COUNTS[site], ndarrays_to_parameters([values]))
        return [bytes_to_ndarray(each) for each in found[self.key.MASKED_PARAMETERS]]

    def shares(self, active: Sequence[int], gone: Sequence[int]) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """What the server puts together from the sites' answers: seeds of own masks, secret keys."""
        seeds: dict[int, list[bytes]] = {site: [] for site in active}
        secrets: dict[int, list[bytes]] = {site: [] for site in gone}
        for site in active:
            asked = {self.key.ACTIVE_NODE_ID_LIST: list(active), self.key.DEAD_NODE_ID_LIST: list(gone)}
            found = self.client._unmask(self.states[site], asked)[self.key.SHARE_LIST]
            for name, share in zip(active, found[: len(active)], strict=True):
                seeds[name].append(share)
            for name, share in zip(gone, found[len(active) :], strict=True):
                secrets[name].append(share)
        return ({s: self.combine(each) for s, each in seeds.items()}, {s: self.combine(each) for s, each in secrets.items()})

    def pair(self, secret: bytes, other: int, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        key = self.shared(self.client.bytes_to_private_key(secret), self.client.bytes_to_public_key(self.public[other][0]))
        return self.mask(key, MOD, shapes)

    def unmasked(self, sent: dict[int, list[np.ndarray]], gone: Sequence[int]) -> np.ndarray:
        """The mean over `sent`, after the masks are taken off."""
        active = list(sent)
        shapes = [each.shape for each in sent[active[0]]]
        total = [sum(arrays) for arrays in zip(*sent.values(), strict=True)]
        seeds, secrets = self.shares(active, gone)
        for seed in seeds.values():
            total = [a - b for a, b in zip(total, self.mask(seed, MOD, shapes), strict=True)]
        for lost, secret in secrets.items():
            for other in active:
                sign = 1 if lost > other else -1
                total = [a + sign * b for a, b in zip(total, self.pair(secret, other, shapes), strict=True)]
        return self.mean([each % MOD for each in total], len(active))

    def mean(self, total: list[np.ndarray], sites: int) -> np.ndarray:
        weight, values = int(total[0].item()), self.dequantize([total[1]], CLIP, TARGET)[0]
        return (values - (sites - 1) * CLIP) * TARGET / weight


def flower() -> None:
    held = factors()
    for start, stop in GROUPS:
        for gone in ((), (3,)):
            own, flows = owners(start, list(RANKS)), Flower()
            here = [site for site in own if site not in gone]
            what = f"slices {start + 1} to {stop}, {len(own)} owners, gone {sum(s in own for s in gone)}: error of the mean"
            try:
                flows.keys(own)
                sent = {site: flows.masked(site, held[site][start:stop]) for site in here}
                mean = flows.unmasked(sent, [site for site in own if site not in here])
                say(what, f"{_far(mean, held, start, stop, here):.1e}")
            except ValueError as error:
                say(what, f"refused ({error})")
    _both_lists(held)
    _small_seeds(held)
    values, flows = np.random.default_rng(1).normal(0, 0.02, 6 * MB).astype(np.float32), Flower()
    flows.keys(list(RANKS))
    sent, seconds = {}, 0.0
    for site in RANKS:
        sent[site], took = timed(lambda site=site: flows.masked(site, values))
        seconds += took / len(RANKS)
    _, adding = timed(lambda: flows.unmasked(sent, ()))
    size = sum(each.nbytes for each in sent[1]) / MB
    say("an adapter of 24 MB, 4 sites: mask, at the site", f"{seconds:.1f} s, {size:.0f} MB on the wire")
    say("  add and unmask, at the server, all sites", f"{adding:.1f} s")
    say("  peak memory of this process, which is all sites and server", peak())


def _both_lists(held: dict[int, np.ndarray]) -> None:
    """A server that says of site 2, in one question, that it is there and that it is gone."""
    flows = Flower()
    flows.keys(list(RANKS))
    sent = {site: flows.masked(site, held[site][:4]) for site in RANKS}
    seeds, secrets = flows.shares(list(RANKS), [2])
    shapes = [each.shape for each in sent[2]]
    bare = [a - b for a, b in zip(sent[2], flows.mask(seeds[2], MOD, shapes), strict=True)]
    for other in (1, 3, 4):
        sign = -1 if other < 2 else 1
        bare = [a + sign * b for a, b in zip(bare, flows.pair(secrets[2], other, shapes), strict=True)]
    mean = flows.mean([each % MOD for each in bare], 1)
    say("a server that names site 2 as there and as gone reads its upload, to", f"{np.abs(mean - held[2][:4]).max():.1e}")


def _small_seeds(held: dict[int, np.ndarray]) -> None:
    """Masks come from the Mersenne twister, whose state follows from 624 of its words, seeded with 32 bits."""
    flows = Flower()
    seed = os.urandom(32)
    folded = 0
    for place in range(0, 32, 4):
        folded ^= int.from_bytes(seed[place : place + 4], "little")
    twister = np.random.MT19937()
    twister._legacy_seeding(folded)
    same = (flows.mask(seed, MOD, [(1000,)])[0] == twister.random_raw(1000).astype(np.int64)).all()
    say("a mask is the Mersenne twister's raw words, seeded with 32 of the key's 256 bits", bool(same))
    draws, seeds = np.random.RandomState(0), 20_000
    _, seconds = timed(lambda: [(draws.seed(each), draws.randint(0, MOD - 1, 4, dtype=np.int64)) for each in range(seeds)])
    say("  all 2^32 seeds of a pair, in Python on one core", f"{seconds / seeds * 2**32 / 3600:.0f} hours")
    # Two sites of which one has rank 4 and pads its slices to 16 with zeros, as equal shapes need.
    flows.keys([1, 4])
    padded = np.zeros((16, WIDTH), np.float32)
    padded[:4] = held[1]
    sent = {1: flows.masked(1, padded), 4: flows.masked(4, held[4])}
    seeds_of, _ = flows.shares([1, 4], ())
    shapes = [each.shape for each in sent[1]]
    ours = (sent[1][1] - flows.mask(seeds_of[1], MOD, shapes)[1]) % MOD  # without its own mask: values and the pair's
    words = (TARGET // 2 - ours.ravel()[4 * WIDTH :]) % MOD  # the pair's mask where zeros were
    # the first word of the stream masked the weight, so that these are words 1 + 4 * 1024 and on
    state = _untempered(words[:624])
    ahead = np.random.MT19937()
    ahead.state = {"bit_generator": "MT19937", "state": {"key": state, "pos": 624}}
    right = (ahead.random_raw(1000).astype(np.int64) == words[624:1624]).all()
    say("  two sites, one padded with zeros: 624 zeros give the server the rest of the mask", bool(right))


def _untempered(words: np.ndarray) -> np.ndarray:
    """The twister's state from 624 of its words in a row."""
    found = words.astype(np.uint32)
    found = found ^ (found >> np.uint32(18))
    found = found ^ ((found << np.uint32(15)) & np.uint32(0xEFC60000))
    part = found
    for _ in range(5):
        part = found ^ ((part << np.uint32(7)) & np.uint32(0x9D2C5680))
    found = part
    for _ in range(3):
        part = found ^ (part >> np.uint32(11))
    return part


# --- declearn: masks, and Joye-Libert ----------------------------------------------------------------------------------


def declearn() -> None:
    from declearn.secagg.joye_libert._primitives import encrypt
    from declearn.secagg.masking._decrypt import MaskingDecrypter
    from declearn.secagg.masking._encrypt import MaskingEncrypter

    held, clip = factors(), 1.0 * sum(COUNTS.values())

    def seeds_of(own: Sequence[int]) -> dict[tuple[int, int], int]:
        return {(a, b): int.from_bytes(os.urandom(32), "big") for a in own for b in own if a < b}

    for start, stop in GROUPS:
        own = owners(start, list(RANKS))
        seeds, sent = seeds_of(own), {}
        for site in own:
            after, before = [seeds[site, s] for s in own if s > site], [seeds[s, site] for s in own if s < site]
            box = MaskingEncrypter(after, before, 64, clip)
            values = (held[site][start:stop].astype(np.float64) * COUNTS[site]).ravel().tolist()
            sent[site] = box.encrypt_uint_list(box.quantizer.quantize_list(values))
        for gone in ((), (3,)):
            here, box = [s for s in own if s not in gone], MaskingDecrypter(len(own), 64, clip)
            total = [sum(each) % box.max_int for each in zip(*(sent[s] for s in here), strict=True)]
            read = np.array(total, float) * box.quantizer._step_size - len(here) * box.quantizer.val_range
            mean = read.reshape(stop - start, WIDTH) / sum(COUNTS[s] for s in here)
            what = f"slices {start + 1} to {stop}, {len(own)} owners, gone {len(own) - len(here)}: largest error of the mean"
            say(what, f"{_far(mean, held, start, stop, here):.1e}")
    lone = np.array(sent[4], float) * box.quantizer._step_size - box.quantizer.val_range
    bare = np.abs(lone / COUNTS[4] - held[4][8:].ravel()).max()
    say("slices of a single owner: its 'masked' upload differs from the clear one by", f"{bare:.1e}")
    boxes = MaskingEncrypter([1 << 200, 1 << 201, 1 << 202], [], 64, clip)
    say("masks come from", type(boxes._pos_rng[0].bit_generator).__name__)
    values = np.random.default_rng(1).normal(0, 0.02, 6 * MB).tolist()
    whole, quantizing = timed(lambda: boxes.quantizer.quantize_list(values))
    _, masking = timed(lambda: boxes.encrypt_uint_list(whole))
    cost = f"{quantizing + masking:.1f} s, 48 MB on the wire at 8 bytes a value"
    say("an adapter of 24 MB, 4 sites: quantise and mask, at the site", cost)
    say("  peak memory of this process, one site", peak())
    _, seconds = timed(lambda: [encrypt(12345, index, (1 << 2040) + 12345) for index in range(50)])
    say("Joye-Libert: 6 million values, one by one", f"{seconds / 50 * 6 * MB / 3600:.0f} hours, {6 * 256 / 1e3:.1f} GB")


# --- Fed-BioMed: low-overhead masking ------------------------------------------------------------------------------------


def fedbiomed() -> None:
    from fedbiomed.common.secagg._lom import LOM

    held, scale, lom = factors(), 1 << 30, LOM(os.urandom(16))
    pairs = {frozenset((a, b)): os.urandom(32) for a in RANKS for b in RANKS if a < b}

    def masked(site: int, number: int, values: list[int], own: Sequence[int]) -> list[int]:
        secrets = {f"site-{s}": pairs[frozenset((site, s))] for s in own if s != site}
        return lom.protect(f"site-{site}", secrets, number, values, [f"site-{s}" for s in own])

    def whole(site: int, start: int, stop: int) -> list[int]:  # moved above zero by 1, as quantisers do
        return np.rint((held[site][start:stop].astype(np.float64) + 1) * scale * COUNTS[site]).astype(np.int64).ravel().tolist()

    for number, (start, stop) in enumerate(GROUPS):
        own = owners(start, list(RANKS))
        sent = {site: masked(site, number, whole(site, start, stop), own) for site in own}
        for gone in ((), (3,)):
            here = [s for s in own if s not in gone]
            count = sum(COUNTS[s] for s in here)
            total = np.array(lom.aggregate([sent[s] for s in here]), float)
            mean = np.reshape(total / scale / count - 1, (stop - start, WIDTH))
            what = f"slices {start + 1} to {stop}, {len(own)} owners, gone {len(own) - len(here)}: largest error of the mean"
            say(what, f"{_far(mean, held, start, stop, here):.1e}")
    say("slices of a single owner leave the site as they are", sent[4] == whole(4, 8, 16))
    one, two = (np.array(masked(2, 9, whole(2, *group), list(RANKS)), np.uint64) for group in ((0, 4), (4, 8)))
    clear = np.array(whole(2, 4, 8)) - np.array(whole(2, 0, 4))
    same = ((two - one).astype(np.int64) == clear).all()
    say("two groups under one round number: the server has their difference in the clear", bool(same))
    values = np.random.default_rng(1).integers(0, 1 << 40, 6 * MB).tolist()
    _, seconds = timed(lambda: masked(1, 10, values, list(RANKS)))
    say("an adapter of 24 MB, 4 sites: mask, at the site", f"{seconds:.1f} s, 48 MB on the wire at 8 bytes a value")
    say("  peak memory of this process, one site", peak())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tries = {each.__name__: each for each in (tenseal, flower, declearn, fedbiomed)}
    options.add_argument("library", choices=sorted(tries))
    tries[options.parse_args().library]()


if __name__ == "__main__":
    main()
