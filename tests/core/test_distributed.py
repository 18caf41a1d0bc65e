"""What ranks agree on, and how often."""

from __future__ import annotations

import pytest

from hpc_neuro.core import distributed


def test_ranks_agree_about_once_per_second_of_the_slowest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank takes 10 ms per step, another one 250 ms; a signal comes to the other one in step 7."""
    clock = [0.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    asked, signal_came = list[int](), False

    def reduce(*numbers: int) -> list[int]:
        flag, milliseconds = numbers
        asked.append(milliseconds)
        return [max(flag, signal_came), max(milliseconds, 250)]

    monkeypatch.setattr(distributed, "largest_of_ranks", reduce)
    agreement = distributed.PacedAgreement(1.0)
    answers = []
    for step in range(1, 14):
        clock[0] += 0.01
        signal_came = step >= 7
        answers.append(agreement.agree(step, False))

    assert [step for step, answer in enumerate(answers, start=1) if answer is not None] == [1, 5, 9, 13]
    assert [answer for answer in answers if answer is not None] == [[False], [False], [True], [True]]
    assert all(9 <= milliseconds <= 11 for milliseconds in asked)


def test_a_process_alone_asks_itself_after_each_step() -> None:
    agreement = distributed.PacedAgreement(1e9)
    assert [agreement.agree(step, step == 2, False) for step in (1, 2, 3)] == [
        [False, False],
        [True, False],
        [False, False],
    ]
