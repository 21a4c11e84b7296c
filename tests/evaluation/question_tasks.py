"""Tasks of the harness that lie in a folder, with their data beside them."""

from __future__ import annotations

import json
from pathlib import Path

HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""

WRITTEN = """\
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""

READ = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: byte_perplexity
"""

GROUP = """\
group: {name}
task:
{members}
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


def save_task(folder: Path, name: str, questions: int, template: str = CHOICE) -> Path:
    """A task of its own data; its file."""
    options = [[chr(97 + (n + shift) % 26) for shift in (0, 5, 11)] for n in range(questions)]
    rows = [{"question": f"{name} {n}?", "choices": options[n], "answer": n % 3} for n in range(questions)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text((HEAD + template).format(name=name))
    return folder / f"{name}.yaml"


def save_group(folder: Path, name: str, members: list[str]) -> Path:
    """A group of tasks or groups of the same folder; its file."""
    (folder / f"{name}.yaml").write_text(
        GROUP.format(name=name, members="\n".join(f"  - {member}" for member in members))
    )
    return folder / f"{name}.yaml"
