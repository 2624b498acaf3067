"""Tasks of lm-eval on local files: each result is recounted from a forward pass without padding."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs pip install 'moejax[lm-eval]'")
from test_score import CONFIG, UNIFORM, direct

from moejax.config import ConfigError
from moejax.evaluate import Restored
from moejax.score import Sampling, Scorer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of `datasets`

QUESTIONS = ["one and two,", "the sun, and", "red or green"]  # 12 bytes each
CHOICES = ["alpha1", "beta22", "gamma3", "delta4"]  # with a space before: rows of 19 ids
ANSWERS = [0, 1, 2]
TEXTS = ["In the beginning was the word, an", "Y aconteció que en aquellos días"]  # 33 bytes each
PROMPTS = ["0123456789abc", "cba9876543210"]  # and 5 new tokens
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
metadata:
  version: 1.0
"""
CHOICE = """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
GENERATE = """
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 5
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The module, imported where `datasets` finds no network and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        from moejax import lm_eval_adapter

        yield lm_eval_adapter


@pytest.fixture(scope="module")
def restored(mesh, params_of):
    return Restored(mesh, 0, params_of(CONFIG, mesh), {}, {})


@pytest.fixture(scope="module")
def scorer(restored):
    return Scorer(CONFIG, restored)


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def write_task(folder, name, kind, about, rows):
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    head = YAML.format(name=name, file=file, kind=kind)
    (folder / f"{name}.yaml").write_text(head + about)


@pytest.fixture(scope="module")
def results(adapter, restored, scorer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": question, "choices": CHOICES, "answer": answer}
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    write_task(folder, "choices", "multiple_choice", CHOICE, rows)
    write_task(folder, "texts", "loglikelihood_rolling", ROLLING, [{"text": t} for t in TEXTS])
    said = scorer.generate([ids(prompt) for prompt in PROMPTS], Sampling(5))
    rows = [{"prompt": PROMPTS[0], "answer": said[0]}, {"prompt": PROMPTS[1], "answer": "no"}]
    write_task(folder, "answers", "generate_until", GENERATE, rows)
    names = ("choices", "texts", "answers")
    manager = adapter.load_tasks(names, folder)
    return adapter.run_tasks(CONFIG, restored, names, manager)


def test_multiple_choice_takes_the_likeliest(mesh, restored, results):
    right = 0
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        rows = [ids(f"{question} {choice}") for choice in CHOICES]
        assert {len(row) for row in rows} == {19}
        totals = [direct(mesh, restored.params, row)[0][-7:].sum() for row in rows]
        right += int(np.argmax(totals)) == answer
    assert results["choices"]["acc"] == pytest.approx(right / 3)
    assert results["choices"]["samples"] == 3
    assert results["choices"]["acc_stderr"] is not None


def test_the_perplexity_of_whole_texts(mesh, restored, results):
    total = sum(UNIFORM + direct(mesh, restored.params, ids(t))[0].sum() for t in TEXTS)
    size = sum(len(t.encode()) for t in TEXTS)
    bits = -total / size / math.log(2)
    assert results["texts"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert results["texts"]["byte_perplexity"] == pytest.approx(2**bits, rel=1e-5)


def test_generated_answers_are_compared(results):
    assert results["answers"]["exact_match"] == 0.5


def test_the_cost_is_told(results):
    cost = results["cost"]
    assert cost["seconds"] > 0
    assert cost["peak_memory_bytes"] > 1 << 20
    assert cost["cut_contexts"] == 0


def test_no_torch_is_imported(results):
    import sys

    assert "torch" not in sys.modules


def test_the_harness_s_requests(adapter, scorer, mesh, restored):
    """A space at the end of a context belongs to the continuation; an empty context stays so."""

    class Instance:
        def __init__(self, *args):
            self.args = args

    model = adapter.HarnessModel(scorer)
    pairs = [("one and two, ", "alpha1"), ("one and two,", " alpha1"), ("", "one and two, alpha1")]
    spaced, plain, empty = model.loglikelihood([Instance(*pair) for pair in pairs])
    assert spaced == plain
    log_p, _ = direct(mesh, restored.params, ids("one and two, alpha1"))
    assert plain[0] == pytest.approx(log_p[-7:].sum(), rel=1e-5)
    assert empty == (pytest.approx(UNIFORM + log_p.sum(), rel=1e-5), False)


def test_text_behind_a_stop_string_is_left_out(adapter):
    assert adapter._until("a b\n\nc", ["\n\n", "c"]) == "a b"
    assert adapter._until("abc", "c") == "ab"
    assert adapter._until("abc", []) == "abc"


def test_how_tasks_ask_to_generate(adapter):
    of = adapter.sampling_of
    assert of({"until": ["x"], "do_sample": False, "temperature": 0.7}, 128) == Sampling(64)
    assert of({"max_gen_toks": 7}, 128) == Sampling(7)
    assert of({}, 4096) == Sampling(256)
    assert of({"temperature": 0.5, "top_p": 0.9, "max_tokens": 3}, 128) == Sampling(3, 0.5, 0.9)
    assert of({"do_sample": True}, 128) == Sampling(64, 1.0)
    with pytest.raises(ConfigError, match=r"generation_kwargs of the task has num_beams, which"):
        of({"num_beams": 4}, 128)


def test_tasks_that_are_not_there_or_broken_are_refused(adapter, restored, tmp_path):
    write_task(tmp_path, "mine", "multiple_choice", CHOICE, [{"question": "?"}])
    with pytest.raises(ConfigError, match=r"no task 'yours' in --tasks_path .* has 1: mine"):
        adapter.load_tasks(["mine", "yours"], tmp_path)
    manager = adapter.load_tasks(["mine"], tmp_path)
    with pytest.raises(ConfigError, match=r"--tasks mine cannot be run: .*; mend the task's YAML"):
        adapter.run_tasks(CONFIG, restored, ["mine"], manager)
