"""Losses of next-token distributions: against torch's own, with their gradients, in chunks and over parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_graft.distill import token_targets
from peft_graft.distill.token_targets import (
    VocabularyPart,
    divergence,
    in_chunks,
    likeliest,
    reverse_divergence,
    text_loss,
)
from peft_graft.models.output import OutputLayer


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equal_distributions_have_no_divergence_and_no_gradient():
    logits = (3 * drawn(7, 50)).requires_grad_()
    top, log_p = likeliest(logits.detach().log_softmax(-1))
    found = divergence(logits, top, log_p)
    found.sum().backward()
    assert float(found.detach().abs().max()) < 1e-6
    assert float(logits.grad.abs().max()) < 1e-6


def test_a_distribution_of_few_tokens_is_compared_whole():
    teacher, student = (2 * drawn(5, 12, seed=seed) for seed in (1, 2))
    top, log_p = likeliest(teacher.log_softmax(-1))
    whole = nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(divergence(student, top, log_p), whole.sum(-1), atol=1e-5, rtol=1e-4)


def test_taking_the_rest_as_one_token_gives_at_most_the_whole_divergence():
    teacher, student = (drawn(64, 200, seed=seed) for seed in (1, 2))
    top, log_p = likeliest(teacher.log_softmax(-1))
    whole = nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
    found = divergence(student, top, log_p)
    assert bool((found >= 0).all())
    assert bool((found <= whole.sum(-1) + 1e-5).all())
    assert float(found.mean()) > 0.05 * float(whole.sum(-1).mean())


def test_mass_on_tokens_that_the_teacher_does_not_know_is_divergence():
    teacher = drawn(4, 20)
    top, log_p = likeliest(teacher.log_softmax(-1))
    same = torch.cat([teacher, torch.full((4, 5), -30.0)], 1)
    more = torch.cat([teacher, torch.full((4, 5), 3.0)], 1)
    assert float(divergence(same, top, log_p).max()) < 1e-5
    assert float(divergence(more, top, log_p).min()) > 0.1


def test_the_reverse_divergence_is_over_what_the_student_would_say():
    student = drawn(6, 30, seed=3).requires_grad_()
    teacher = drawn(6, 25, seed=4).log_softmax(-1)
    top = student[:, :25].detach().topk(16, -1).indices
    log_q, log_p = student.gather(1, top).log_softmax(-1), teacher.gather(1, top).log_softmax(-1)
    wanted = (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(reverse_divergence(student, teacher), wanted)
    same = reverse_divergence(student, student[:, :25].log_softmax(-1).detach())
    assert float(same.detach().abs().max()) < 1e-6


@pytest.mark.parametrize("frozen", [True, False])
def test_chunks_give_the_loss_and_the_gradient_of_the_whole(monkeypatch, frozen):
    monkeypatch.setattr(token_targets, "CHUNK_BYTES", 4 * 40 * 3)  # three rows at a time
    layer, column = nn.Linear(8, 40), torch.arange(10)
    whole, parts = drawn(10, 8).requires_grad_(), drawn(10, 8).requires_grad_()
    text_loss(layer(whole), column).sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    found = in_chunks(parts, 40, lambda rows, part: text_loss(layer(rows), column[part]), frozen=frozen)
    (2 * found).backward()
    torch.testing.assert_close(found, text_loss(layer(whole), column).sum())
    torch.testing.assert_close(parts.grad, 2 * whole.grad)
    if frozen:
        assert layer.weight.grad is None  # and no time was spent on it
    else:
        torch.testing.assert_close(layer.weight.grad, 2 * expected)


def test_nothing_to_learn_is_a_loss_of_zero_with_a_gradient_of_zero():
    states = torch.empty(0, 8).requires_grad_()
    found = in_chunks(states, 40, lambda rows, part: rows.sum(1), frozen=True)
    found.backward()
    assert float(found.detach()) == 0


@pytest.mark.parametrize("tokens", [[3, 1, 7], list(range(40))[::-1], list(range(40))])
def test_the_logits_of_some_tokens_are_those_of_the_whole_vocabulary(tokens):
    layer = nn.Linear(8, 44).requires_grad_(False)  # wider than the vocabulary, as many models are
    output = OutputLayer(layer, scale=0.5, softcap=3.0)
    part = VocabularyPart(torch.tensor(tokens), 40)
    states = drawn(6, 8)
    torch.testing.assert_close(part.logits(output, states), output.logits(states)[:, tokens])
    assert part.is_whole == (tokens == list(range(40)))
