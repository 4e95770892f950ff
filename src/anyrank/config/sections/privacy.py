"""`[privacy]`: differential privacy of a whole run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from anyrank.config.describe import LATER, NATURAL, POSITIVE, key
from anyrank.config.sections.values import expect, one_of
from anyrank.errors import ConfigError

PRIVACY_LEVELS = ("none", "example", "person", "client")
NOISE_AT = ("client", "server")
ACCOUNTANTS = ("pld", "prv", "rdp")
COUNTS = ("rounded", "exact")
_LEAST_NOISE = 0.01  # of the clip norm
_LIMIT = "a number of at least 0"
NOISES = ("independent", "correlated")


@dataclass(frozen=True)
class PrivacyConfig:
    """`[privacy]`: differential privacy over the whole run. Give epsilon, or noise_multiplier, not both."""

    level: str = key(
        "none",
        "What is protected: one example, all examples of one person (data.person names whose each is; train.batch_size then "
        "counts persons), or all examples of one client. none: no privacy, and no other key of this section may be set.",
        PRIVACY_LEVELS,
    )
    examples_per_person: int = key(
        0,
        "The most examples of one person that a step uses, for level person: drawn anew from all of the person's in each step. "
        "0: all of them.",
        f"{NATURAL}; only with level = 'person'",
    )
    epsilon: float = key(
        0.0,
        "Privacy budget of the whole run, at delta; the noise is computed from it.",
        f"{POSITIVE}, or 0 if noise_multiplier is given",
        {"Opacus": "target_epsilon"},
    )
    delta: float = key(
        0.0,
        "The probability with which the guarantee of epsilon may fail.",
        "a number above 0, below 1 over the number of examples",
        {"Opacus": "target_delta"},
    )
    ceiling: float = key(
        0.0,
        "The most epsilon, at delta, that all private runs on this data together may spend for one example, this one included: "
        "a run that would spend more is refused. Whatever its level: a step at level person or client counts for an example "
        "with half its noise and at rate 1. 0: no such limit. See anyrank privacy --spent.",
        _LIMIT,
        metadata=LATER,
    )
    clip: float = key(
        1.0,
        "The largest norm that an example's gradient, or a client's update, keeps.",
        POSITIVE,
        {"Opacus": "max_grad_norm", "Flower": "clipping_norm"},
    )
    noise_multiplier: float = key(
        0.0,
        "Standard deviation of the noise divided by clip, instead of epsilon; epsilon is then computed from it.",
        f"{POSITIVE}, or 0 if epsilon is given",
    )
    max_rounds: int = key(0, "Maximum number of rounds that each client may take part in. 0: all rounds.", NATURAL)
    noise: str = key(
        "independent",
        "Whether the noise of a client's steps is independent, or correlated so that it partly cancels in their sum (DP-FTRL); "
        "each example is then drawn in every bands-th step only.",
        NOISES,
    )
    bands: int = key(
        0,
        "Of correlated noise: how many steps are correlated, at most a client's examples over batch_size. 0: as many as give "
        "the least noise in the sum of the steps.",
        NATURAL,
    )
    accountant: str = key("pld", "The accountant that computes what is spent.", ACCOUNTANTS)
    counts: str = key(
        "rounded", "Whether a client's number of examples is rounded (rounded) or exact when it is used or sent.", COUNTS
    )
    secure: bool = key(
        False,
        "Whether noise comes from the system's cryptographic source instead of a key. The noise cannot be drawn again, so the "
        "run can then not be reproduced from its configuration.",
        also={"Opacus": "secure_mode"},
    )
    noise_at: str = key(
        "client",
        "Who adds the noise of level client: each client to its upload, or the server once to the mean of the uploads. The "
        "server must then be trusted with the uploads.",
        NOISE_AT,
    )
    secure_sum: bool = key(
        False,
        "Whether the server sees sums of uploads only. true is refused in this version, with the reason: "
        "docs/secure-summation.md.",
        "false",
    )

    @property
    def draws_units(self) -> bool:
        """Whether each step draws what is protected, an example or a person, and adds noise."""
        return self.level in ("example", "person")

    def __post_init__(self) -> None:
        one_of(self.level, PRIVACY_LEVELS, "privacy.level")
        one_of(self.accountant, ACCOUNTANTS, "privacy.accountant")
        one_of(self.counts, COUNTS, "privacy.counts")
        one_of(self.noise, NOISES, "privacy.noise")
        one_of(self.noise_at, NOISE_AT, "privacy.noise_at")
        if self.level == "none":
            for each in dataclasses.fields(self):
                if each.name == "secure_sum":  # hides uploads from the server, with or without noise
                    continue
                value = getattr(self, each.name)
                expect(
                    value == each.default,
                    f"privacy.{each.name}",
                    "level = 'example', 'person' or 'client' to be set too",
                    value,
                )
            return
        right = self.examples_per_person >= 0 if self.level == "person" else self.examples_per_person == 0
        wanted = f"{NATURAL} with level = 'person', and 0 with any other level"
        expect(right, "privacy.examples_per_person", wanted, self.examples_per_person)
        given = "privacy.noise_multiplier" if self.noise_multiplier else "privacy.epsilon"
        if self.epsilon and self.noise_multiplier:
            raise ConfigError("privacy: give epsilon (the noise follows) or noise_multiplier (epsilon follows), not both")
        value = self.noise_multiplier or self.epsilon
        expect(0 < value < math.inf, given, "a number above 0 (or the other of epsilon and noise_multiplier)", value)
        if self.noise_multiplier:
            expect(value >= _LEAST_NOISE, given, f"at least {_LEAST_NOISE}, since less noise protects nobody", value)
        expect(0 < self.delta < 1, "privacy.delta", "a number above 0, below 1 over the number of examples", self.delta)
        expect(0 <= self.ceiling < math.inf, "privacy.ceiling", _LIMIT, self.ceiling)
        expect(0 < self.clip < math.inf, "privacy.clip", POSITIVE, self.clip)
        if self.noise_at == "server" and self.level != "client":
            raise ConfigError(
                f"privacy.noise_at: expected 'client' with level = {self.level!r}, whose noise is added during training, got "
                "'server'; use level = 'client' for noise at the server"
            )
        expect(self.max_rounds >= 0, "privacy.max_rounds", NATURAL, self.max_rounds)
        self._check_noise()

    def _check_noise(self) -> None:
        """Refuse what correlated noise cannot be combined with."""
        expect(self.bands >= 0, "privacy.bands", NATURAL, self.bands)
        if self.noise == "independent":
            expect(not self.bands, "privacy.bands", "0 with noise = 'independent'", self.bands)
            return
        if self.level != "example":
            raise ConfigError(
                f"privacy.noise: expected 'independent' with level = {self.level!r}, got 'correlated', for which each "
                "example is drawn in one of several groups of steps; use level = 'example'"
            )
        if self.secure:
            raise ConfigError(
                "privacy.noise: 'correlated' draws the noise of earlier steps again, which privacy.secure = true prevents; use "
                "secure = false, or 'independent'"
            )
        if self.noise_multiplier and not self.bands:
            raise ConfigError("privacy.bands: expected a number above 0 with noise_multiplier; 0 is chosen for an epsilon")
