import math

import pytest
import torch

from c2r.models.adversary import OWN_GRADIENT_SCALE, DomainClassifier, domain_loss, scale_gradient


def tiny_classifier(dtype=torch.float32):
    torch.manual_seed(0)
    return DomainClassifier(in_channels=4, width=8).to(dtype)


def inputs(batch_size=3, dtype=torch.float32, size=(3, 8, 12)):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch_size, 4, *size, generator=generator, dtype=dtype)
    return latents, torch.linspace(0.1, 0.9, batch_size, dtype=dtype)


def test_the_latents_gradient_is_reversed_and_the_classifiers_own_is_only_scaled():
    classifier = tiny_classifier(torch.float64)
    latents, sigmas = inputs(dtype=torch.float64)
    domains = torch.tensor([0, 1, 1])

    def gradients(strength):
        """Of the latents and of the classifier's weights."""
        classifier.zero_grad()
        leaf = latents.clone().requires_grad_()
        logits = classifier(leaf, sigmas, strength)
        domain_loss(logits, domains, torch.ones(3, dtype=torch.bool), 0.5).mean().backward()
        return leaf.grad, [parameter.grad / OWN_GRADIENT_SCALE for parameter in classifier.parameters()]

    plain, own = gradients(torch.full((3,), -1.0, dtype=torch.float64))  # twice reversed
    strength = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64)
    reversed_, own_again = gradients(strength)
    assert (plain != 0).any()
    torch.testing.assert_close(reversed_, -strength.view(3, 1, 1, 1, 1) * plain, rtol=1e-10, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(own, own_again))

    # Against the definition, by finite differences: one step along the gradient raises the loss so much.
    def loss(latents):
        logits = classifier(latents, sigmas, strength)
        return domain_loss(logits, domains, torch.ones(3, dtype=torch.bool), 0.5).mean()

    step = 1e-5 * plain / plain.norm()
    slope = (loss(latents + step) - loss(latents - step)) / 2e-5
    torch.testing.assert_close(slope, plain.norm(), rtol=1e-6, atol=0)


def test_scaling_a_gradient_leaves_the_values():
    tensor = torch.randn(2, 5)
    assert torch.equal(scale_gradient(tensor, torch.tensor([-3.0, 0.0])), tensor)


def test_it_learns_to_tell_flat_from_textured():
    """In proportion 1 to 4, and its own gradients are scaled: AdamW does not mind."""
    classifier = tiny_classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(120):
        domains = (torch.arange(10) % 5 == 0).long()
        texture = torch.where(domains == 1, 0.5, 1.0).view(-1, 1, 1, 1, 1)
        latents = texture * torch.randn(10, 4, 2, 8, 8, generator=generator)
        logits = classifier(latents, torch.rand(10, generator=generator), torch.zeros(10))
        loss = domain_loss(logits, domains, torch.ones(10, dtype=torch.bool), 0.2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)
    assert losses[-1] < 0.3
    assert ((logits > 0) == domains).all()


def test_both_domains_have_half_of_the_loss():
    domains = torch.tensor([0] * 4 + [1])
    losses = domain_loss(torch.zeros(5), domains, torch.ones(5, dtype=torch.bool), 0.2)
    torch.testing.assert_close(losses[:4].sum(), losses[4])
    assert losses.mean().item() == pytest.approx(math.log(2))


def test_what_does_not_count_has_no_gradient_and_a_domain_no_longer_drawn_a_finite_one():
    logits = torch.zeros(2, requires_grad=True)
    domain_loss(logits, torch.tensor([0, 1]), torch.tensor([False, True]), 0.0).sum().backward()
    assert logits.grad[0] == 0
    assert torch.isfinite(logits.grad[1])
    assert logits.grad[1] != 0


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 7), (21, 12, 20)])
def test_it_takes_any_size_and_computes_in_fp32_under_autocast(size):
    classifier = tiny_classifier()
    latents, sigmas = inputs(size=size)
    strength = torch.zeros(3)
    expected = classifier(latents, sigmas, strength)
    assert expected.shape == (3,)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(latents, sigmas, strength), expected)
    assert not torch.equal(classifier(latents, sigmas.flip(0), strength), expected)


def test_it_is_small_at_wans_size():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DomainClassifier().parameters())
    assert 1e5 < count < 3e5
