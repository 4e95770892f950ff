"""`make mutants` plants what stands in the source as it is: a list that is out of date would find nothing."""

from __future__ import annotations

from pathlib import Path

import mutants

SOURCE = Path(__file__).resolve().parents[1] / "src" / "anyrank"


def test_every_planted_mistake_changes_one_place_of_the_source() -> None:
    for mistake in mutants.MISTAKES:
        assert (SOURCE / mistake.file).read_text(encoding="utf-8").count(mistake.right) == 1, mistake.name
        assert mistake.wrong != mistake.right


def test_every_stage_names_tests_that_there_are() -> None:
    for mistake in mutants.MISTAKES:
        for stage in mistake.stages:
            for file in stage:
                assert (SOURCE.parents[1] / file.split("::")[0]).exists(), f"{mistake.name}: {file}"
