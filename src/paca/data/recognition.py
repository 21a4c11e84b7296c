"""Which form data has, by its columns; and in words."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping

from datasets import Dataset, Value

from paca.data.formats import FORMATS, Format
from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean

_TRAINERS = {
    "preferences": "train.trainer: dpo or reward",
    "prompts": "train.trainer: grpo",
    "labels": "train.trainer: classification",
}
"""Which learn from a family of forms."""


class LacksColumns(PacaError):
    """Data lacks a column that the form needs which it was said to have."""


def recognise(
    columns: Collection[str],
    requested: str | None,
    source: str,
    forms: Mapping[str, Format] | None = None,
    given: Mapping[str, str] | None = None,
) -> Format:
    """Choose the form of the data.

    Args:
        columns: The names found in the data.
        requested: The name of a form, which is then only checked; `None` to recognise it. A form that needs all
            that another does and more comes before it. `text` is the last resort: many data sets carry a ready-made
            `text` beside the columns that it was made from.
        source: Names the data in errors.
        forms: Those to choose among; `FORMATS` when absent.
        given: Which of `columns` have another name in the data, and which.

    Raises:
        PacaError: The form is unknown or ambiguous.
        LacksColumns: The requested one lacks a column.
    """
    forms = FORMATS if forms is None else forms
    given = given or {}
    found = told_of_columns(columns, source, given)
    if requested is not None:
        if requested not in forms:
            hint = did_you_mean(requested, forms)
            raise PacaError(f"Unknown data format {requested!r}.{hint} Understood are:\n{_overview(forms)}")
        chosen = forms[requested]
        missing = [column for column in chosen.required if column not in columns]
        if missing:
            raise LacksColumns(f"Data in the format {requested!r} needs {' and '.join(missing)}. {found}")
        return chosen
    fitting = [form for form in forms.values() if all(column in columns for column in form.required)]
    if any(form.name == "mmlu" for form in fitting):  # options in a list, and in columns as well
        fitting = [form for form in fitting if form.name != "mmlu-letters"]
    needs = {form.name: set(form.required) for form in fitting}
    fitting = [form for form in fitting if not any(needs[form.name] < other for other in needs.values())]
    if len(fitting) > 1:
        fitting = [form for form in fitting if form.name != "text"]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(repr(form.name) for form in fitting)
        raise PacaError(f"{found} They fit the formats {names}: choose one with data.format.")
    what = f"That is no form of training data known here.\n{_renaming(columns, forms, given)}"
    raise PacaError(f"{found} {what}\nUnderstood are:\n{_overview(forms)}")


def told_of_columns(columns: Collection[str], source: str, given: Mapping[str, str]) -> str:
    """A sentence that names the columns, by their names in the data."""
    return f"{source} has the columns: {', '.join(given.get(name, name) for name in columns) or '(none)'}."


def _renaming(columns: Collection[str], forms: Mapping[str, Format], given: Mapping[str, str]) -> str:
    """What to do with columns of other names, by the form that shares most of them, or is the usual one."""
    usual = "text" if len(columns) < 2 else "question-answer"  # prompt and completion leave the chat template out

    def likeness(form: Format) -> tuple[int, bool, int]:
        shared = sum(column in columns for column in form.required)
        apart = len(form.required) - shared if shared else abs(len(form.required) - len(columns))
        return shared, form.name == usual, -apart

    form = max(forms.values(), key=likeness)
    missing = [column for column in form.required if column not in columns]
    others = [column for column in columns if column not in form.required]
    own = others if len(others) == len(missing) else ["..."] * len(missing)
    pairs = [*((name, own) for name, own in given.items() if name in form.columns), *zip(missing, own, strict=True)]
    names = ", ".join(f"{name}: {column}" for name, column in pairs)
    flag = shlex.quote(",".join(f"{name}={column}" for name, column in pairs))
    return (
        f"Say which columns it has under other names: the nearest form is {form.name}, so give data.columns: "
        f"{{{names}}} (its name: yours) in the run's YAML (or --set data.columns.NAME=YOURS), or "
        f"rename them. (For `paca evaluate --data`: --columns {flag}; in Python columns=.)"
    )


def for_another_trainer(columns: Collection[str], families: Mapping[str, Mapping[str, Format]]) -> str | None:
    """What to say instead where the columns are those that another trainer's `families` of forms have."""
    for family, forms in families.items():
        try:
            form = recognise(columns, None, "", forms)
        except PacaError:
            continue
        # Any data may have a text, or a question among other columns.
        if family != "text" and (family != "prompts" or set(columns) <= set(form.columns)):
            return f"They are those of {form.name}, for {_TRAINERS[family]} (in Python family='{family}')."
    return None


def _overview(forms: Mapping[str, Format]) -> str:
    return "\n".join(
        f"  {form.name}: {', '.join(form.required)}"
        + (f" (optional: {', '.join(form.optional)})" if form.optional else "")
        for form in forms.values()
    )


def describe(form: Format, columns: list[str], dataset: Dataset, given: Mapping[str, str]) -> str:
    """For people: how many examples of which form, from which columns (`given` has the data's own names of some), and
    what they are taken as."""
    used = [column for column in form.columns if column in columns]
    if "messages" in dataset.features:
        result = "conversations"
    elif "label" in dataset.features:
        result = "text and label"
    elif "text" in dataset.features:
        result = "plain text"
    elif "completion" not in dataset.features:
        what = "prompts and pairs of answers" if "chosen" in dataset.features else "prompts"
        result = f"{what}, {'plain text' if dataset.features['prompt'] == Value('string') else 'messages'}"
    elif dataset.features["prompt"] == Value("string"):
        result = "prompts and answers, plain text"
    else:
        result = "prompts and answers, as chat messages"
    count = f"{len(dataset):,} example{'s' if len(dataset) != 1 else ''}"
    left_out = [column for column in columns if column not in (*used, *dataset.features)]
    ending = f" (not used: {', '.join(left_out)})" if left_out else ""
    column = "columns" if len(used) > 1 else "column"
    used = [f"{given[name]} as {name}" if name in given else name for name in used]
    return f"{count} of the form {form.name} ({column} {', '.join(used)}), taken as {result}{ending}"
