import random

import pytest
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tensorpress.errors import InputError
from tensorpress.evaluators.sts import STS, embed, read_pairs

WORDS = [
    "a", "man", "woman", "child", "dog", "cat", "runs", "sleeps", "plays", "sings", "in", "the", "park", "house",
    "garden", "quickly", "slowly",
]  # fmt: skip


@pytest.fixture
def encoder(make_model):
    return make_model("bert", num_hidden_layers=2, vocab_size=len(WORDS) + 2)


@pytest.fixture
def tokenizer():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def sentences(seed, count):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 70))) for _ in range(count)]


@torch.no_grad()
def naive(model, tokenizer, sentence):
    """One sentence alone, without padding, in float64."""
    ids = tokenizer(sentence)["input_ids"][:64]
    return model.double()(torch.tensor([ids])).last_hidden_state[0].mean(0)


def test_embeddings_do_not_depend_on_the_batch(seed, encoder, tokenizer):
    texts = sentences(seed, 11)
    vectors = embed(encoder, tokenizer, texts, 64, 4)
    expected = torch.stack([naive(encoder, tokenizer, text) for text in texts])
    torch.testing.assert_close(vectors.double(), expected, atol=1e-5, rtol=1e-4)


def test_spearman(evaluate, seed, encoder, tokenizer, tmp_path):
    left, right = sentences(seed, 20), sentences(seed + 1, 20)
    scores = [random.Random(seed + i).uniform(0, 5) for i in range(20)]
    path = tmp_path / "pairs.csv"
    rows = [f'"{a}, so",x,{s},"{b}"' for a, s, b in zip(left, scores, right, strict=True)]
    path.write_text("Sentence1,other,SCORE,sentence2\n" + "\n".join(rows) + "\n")
    result = evaluate(STS(), encoder, encoder, torch.zeros(1, 2), tokenizer, pairs=path)
    a = torch.stack([naive(encoder, tokenizer, f"{text}, so") for text in left])
    b = torch.stack([naive(encoder, tokenizer, text) for text in right])
    expected = spearmanr(torch.nn.functional.cosine_similarity(a, b).numpy(), scores).statistic
    assert result.metrics == {"sts_spearman": pytest.approx(100 * expected, abs=1.0)}
    assert result.conditions["pairs"] == 20


def test_layouts(tmp_path):
    expected = ([5.0, 2.4], ['He said "go', "A man"], ["He said go", "A dog"])
    benchmark = tmp_path / "benchmark.csv"
    lines = ['main\tx\t2012\t01\t5.000\tHe said "go\tHe said go', "main\tx\t2012\t02\t2.4\tA man\tA dog\tlicence\tlink"]
    benchmark.write_text("\n".join(lines) + "\n")
    assert read_pairs(benchmark) == expected
    tabs = tmp_path / "tabs.tsv"
    tabs.write_text('index\tsentence1\tsentence2\tscore\r\n0\tHe said "go\tHe said go\t5.0\r\n1\tA man\tA dog\t2.4\r\n')
    assert read_pairs(tabs) == expected
    commas = tmp_path / "commas.csv"
    commas.write_text(
        '\ufeffscore,Sentence1,Sentence2\n5,"He said ""go",He said go\n\n2.4,A man,A dog', encoding="utf-8"
    )
    assert read_pairs(commas) == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file"),
        ("", "has no column score, sentence1, sentence2; its first line has: nothing"),
        ("score,left,sentence2\n1,a,b\n", "has no column sentence1; its first line has: score, left, sentence2"),
        ("score,sentence1,sentence2\n1,a,b\nhigh,a,b\n", "line 3 has no score and two sentences"),
        ("score,sentence1,sentence2\n1,a,b\n2,a\n", "line 3 has no score and two sentences"),
        ("score,sentence1,sentence2\n1,a,b\n", "has 1 pairs; a rank correlation needs two"),
    ],
)
def test_what_is_wrong_with_a_file_takes_one_line(content, problem, tmp_path):
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_pairs(path)
    assert problem in str(caught.value)
    assert str(caught.value).startswith("data.evaluation.pairs: ")
    assert len(str(caught.value).splitlines()) == 1


def test_pairs_are_needed(evaluate, encoder):
    with pytest.raises(InputError, match=r"needs data\.evaluation\.pairs"):
        evaluate(STS(), encoder, encoder, torch.zeros(1, 2))
