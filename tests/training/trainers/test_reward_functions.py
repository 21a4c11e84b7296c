"""The built-in rewards of GRPO."""

from __future__ import annotations

import pytest
import trl.rewards

from paca.training.trainers.reward_functions import BY_TRL, ExactMatch


@pytest.mark.parametrize(
    ("pattern", "completion", "answer", "expected"),
    [
        (None, "42", 42, 1.0),
        (None, " 42 \n", "42", 1.0),
        (None, "it is 42", "42", 0.0),
        (r"####\s*(.+)", "6 * 7\n#### 42", "#### 42", 1.0),
        (r"####\s*(.+)", "#### 1,234", "1234", 1.0),
        (r"####\s*(.+)", "#### 41", "text #### 42", 0.0),
        (r"####\s*(.+)", "42", "#### 42", 0.0),
        (r"<answer>(.*?)</answer>", "<answer>a</answer><answer>b</answer>", "b", 1.0),
    ],
)
@pytest.mark.parametrize("messages", [False, True])
def test_an_answer_counts_if_it_is_the_records(
    pattern: str | None, completion: str, answer: object, expected: float, messages: bool
) -> None:
    written = [{"role": "assistant", "content": completion}] if messages else completion
    assert ExactMatch(pattern)(completions=[written], answer=[answer], prompts=["?"]) == [expected]


def test_trls_rewards_are_there() -> None:
    assert all(callable(getattr(trl.rewards, name)) for name in BY_TRL)
