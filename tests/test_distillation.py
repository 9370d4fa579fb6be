"""A teacher's predictions and text. Oracles: torch's kl_div, information theory, numbers before the disk, no cache."""

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import kl_div

import tiny_models as tiny
from eckart.distillation import Predictions, Shelf, divergence, keeps_cache, predict, sample


def pair(seed, vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, 3, vocabulary, generator=generator) for _ in range(2))


@given(seed=st.integers(0, 99))
def test_the_divergence_over_the_vocabulary_is_torchs(seed):
    student, teacher = pair(seed)
    found = divergence(student, Predictions(teacher.log_softmax(-1)))
    wanted = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    torch.testing.assert_close(found, wanted)


@given(seed=st.integers(0, 99), top=st.integers(1, 10))
def test_fewer_tokens_make_the_divergence_smaller_but_never_negative(seed, top):
    """The data-processing inequality: tokens that are not told apart cannot add to it."""
    student, teacher = pair(seed)
    whole = divergence(student, Predictions(teacher.log_softmax(-1)))
    part = divergence(student, Predictions(*teacher.log_softmax(-1).topk(top, -1)))
    assert -1e-5 <= part <= whole + 1e-5
    itself = divergence(teacher, Predictions(*teacher.log_softmax(-1).topk(top, -1)))
    assert abs(itself) < 1e-5


def test_its_gradient_is_the_difference_of_probabilities():
    student, teacher = pair(0)
    student.requires_grad_(True)
    divergence(student, Predictions(teacher.log_softmax(-1))).backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 6)


def test_a_shelf_gives_back_what_was_put_there_rounded_once(tmp_path):
    model = tiny.build("llama")
    ids = torch.randint(3, 90, (6, 8), generator=torch.Generator().manual_seed(0))
    for top in (5, None):
        whole = top is None
        folder = tmp_path / str(top)
        folder.mkdir()
        shape = (6, 8, top or tiny.VOCABULARY)
        shelf = Shelf(folder, shape, whole=whole)
        assert not shelf.filled
        shelf.fill(predict(model, part, top) for part in ids.split(2))
        assert Shelf(folder, shape, whole=whole).filled
        rows = torch.tensor([4, 1])
        found, wanted = shelf.read(rows, torch.device("cpu")), predict(model, ids[rows], top)
        torch.testing.assert_close(found.log_probabilities, wanted.log_probabilities, rtol=1e-3, atol=1e-3)
        assert whole == (found.tokens is None)
        if not whole:
            assert torch.equal(found.tokens, wanted.tokens)
        assert sum(path.stat().st_size for path in folder.iterdir()) == Shelf.bytes(shape, whole=whole)


def test_a_shelf_that_was_not_filled_to_the_end_is_empty(tmp_path):
    shelf = Shelf(tmp_path, (4, 8, 3), whole=False)

    def broken():
        yield predict(tiny.build("llama"), torch.full((2, 8), 5), 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.fill(broken())
    assert not shelf.filled


def drawn(teacher, beginnings, tokens, seed):
    """The same text without a cache: every token from a reading of all before it."""
    generator, written = torch.Generator().manual_seed(seed), beginnings
    with torch.no_grad():
        while written.shape[1] < tokens:
            probabilities = teacher(input_ids=written, use_cache=False).logits[:, -1].softmax(-1)
            written = torch.cat((written, torch.multinomial(probabilities, 1, generator=generator)), 1)
    return written


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "bloom", "opt", "falcon", "mixtral"])
@pytest.mark.parametrize("beginning", [1, 3])
def test_what_a_teacher_writes_does_not_depend_on_its_cache(name, beginning):
    teacher = tiny.build(name)
    beginnings = torch.arange(5, 5 + 4 * beginning).view(4, beginning)
    found = sample(teacher, beginnings, 20, seed=3)
    assert torch.equal(found, drawn(teacher, beginnings, 20, 3))
    assert torch.equal(found[:, :beginning], beginnings)
    assert not torch.equal(found, sample(teacher, beginnings, 20, seed=4))


def test_a_teacher_writes_each_token_as_often_as_it_predicts_it():
    teacher, count = tiny.build("llama"), 20_000
    beginnings = torch.tensor([[7, 9]]).expand(count, 2)
    with torch.no_grad():
        expected = teacher(input_ids=beginnings[:1]).logits[0, -1].softmax(-1)
    found = sample(teacher, beginnings, 3)[:, -1].bincount(minlength=len(expected)) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 5 * error + 1 / count).all()


def test_a_model_without_keys_and_values_is_known():
    assert keeps_cache(tiny.build("llama"))
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 2}
    assert not keeps_cache(tf.MambaForCausalLM(tf.MambaConfig(**sizes)))
