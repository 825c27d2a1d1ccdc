"""The classification tasks: their prompts, and what a reader is asked."""

from pathlib import Path

import pytest

from atlas_jax.answering.batcher import Batcher, DataConfig
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.tasks.base import Prediction
from atlas_jax.tasks.classification import CLASSIFICATION, RTETask, SST2Task

# The prompts of LM-BFF's README and run_experiment.sh, for an invented line.
PROMPTS = {
    "sst2": "a B. It was <extra_id_0> .", "mr": "a B. It was <extra_id_0> .",
    "cr": "a B. It was <extra_id_0> .", "mpqa": "a B. It was <extra_id_0> .",
    "subj": "a B. This is <extra_id_0> .", "trec": "<extra_id_0> : a B.",
    "cola": "a B. This is <extra_id_0> .", "mnli": "a B ? <extra_id_0> , c D.",
    "snli": "a B ? <extra_id_0> , c D.", "rte": "a B ? <extra_id_0> , c D.",
    "qnli": "a B ? <extra_id_0> , c D.", "qqp": "a B. <extra_id_0> , c D.",
    "mrpc": "a B. <extra_id_0> , c D.",
}  # fmt: skip


def test_each_task_asks_as_lm_bff_does(tmp_path: Path) -> None:
    asked = {}
    for task in (made() for made in CLASSIFICATION):
        line = dict(zip(task.asks, ("a B.", "C D."), strict=False))
        write_jsonl(tmp_path / "x.jsonl", [{**line, "label": task.labels[-1]}])
        (record,) = task.load(tmp_path / "x.jsonl")
        example = task.example(record)
        asked[task.name] = example.query_text
        assert example.answers == (task.words[task.labels[-1]],)
        assert example.choice_score == "first_token"
        assert example.retriever_text == " ".join(line.values())
        right = Prediction(example, example.answers[0])
        assert task.row_fields(right) == {"predicted_label": task.labels[-1]}
    assert asked == PROMPTS


def test_other_words_are_written_and_scored(tmp_path: Path) -> None:
    words = {"positive": ["good", "great"], "negative": "bad"}
    task = SST2Task(label_words=words, query_format="{mask} ! {text}")
    write_jsonl(tmp_path / "x.jsonl", [{"text": "so {it} goes", "label": "positive"}])
    example = task.example(*task.load(tmp_path / "x.jsonl"))
    assert example.query_text == "<extra_id_0> ! so {it} goes"
    assert [choice.answer for choice in example.choices] == ["bad", "good"]
    assert example.answers == ("good",)
    assert task.evaluate([Prediction(example, "good")])["accuracy_positive"] == 1.0
    assert task.evaluate([Prediction(example, "great")])["accuracy"] == 0.0


def test_the_readers_mask_stays_where_a_text_is_long(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    files = (reader_tokenizer_file, retriever_tokenizer_file)
    tokenizers = Tokenizers(*(Tokenizer.from_file(file) for file in files))
    line = {"premise": "abcdefghij" * 5, "hypothesis": "Klm", "label": "entailment"}
    write_jsonl(tmp_path / "x.jsonl", [line])
    example = RTETask().example(*RTETask().load(tmp_path / "x.jsonl"))
    data = DataConfig(query_length=18, target_length=8)
    batch = Batcher(tokenizers, data, choices=2)([example])
    read = tokenizers.reader.decode(batch.query_tokens_bq[0], skip_special=False)
    assert read == "abcdefgh ? <extra_id_0> , klm"
    # the first letters of No and Yes decide, behind <extra_id_0> and a blank
    assert batch.choices is not None
    assert batch.choices.weights_bct[0].sum(axis=1).tolist() == [1.0, 1.0]


def test_wrong_words_and_templates_name_their_binding() -> None:
    with pytest.raises(UserError, match=r"^SST2Task.query_format = '{text}': 0 times {mask}"):
        SST2Task(query_format="{text}")
    with pytest.raises(UserError, match=r"^RTETask.label_words: the task has no label 'maybe'"):
        RTETask(label_words={"maybe": "Maybe"})
    with pytest.raises(UserError, match=r"^RTETask.label_words = .* a word of its own for each"):
        RTETask(label_words={"entailment": "Yes", "not_entailment": "Yes"})
