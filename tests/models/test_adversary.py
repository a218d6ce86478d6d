"""The domain classifier, its reversed gradient, its loss, and the joined model with it."""

import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from c2r.models.adversary import (
    OWN_GRADIENT_SCALE,
    AdversaryOutput,
    DomainClassifier,
    WithAdversary,
    domain_loss,
    scale_gradient,
)
from tests.helpers.tiny import LATENT_CHANNELS, tiny_c2r_transformer, tiny_inputs


def tiny_classifier(dtype=torch.float32):
    torch.manual_seed(0)
    return DomainClassifier(in_channels=4, width=8).to(dtype)


def inputs(batch_size=3, dtype=torch.float32, size=(3, 8, 12)):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch_size, 4, *size, generator=generator, dtype=dtype)
    return latents, torch.linspace(0.1, 0.9, batch_size, dtype=dtype)


def test_the_latents_gradient_is_reversed_and_the_weights_is_scaled():
    classifier = tiny_classifier(torch.float64)
    latents, sigmas = inputs(dtype=torch.float64)
    domains = torch.tensor([0, 1, 1])

    def gradients(strength):
        """Gradients of the latents and of the classifier's weights."""
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

    # Against finite differences: the loss's slope along the normalised gradient is the gradient's norm.
    def loss(latents):
        logits = classifier(latents, sigmas, strength)
        return domain_loss(logits, domains, torch.ones(3, dtype=torch.bool), 0.5).mean()

    step = 1e-5 * plain / plain.norm()
    slope = (loss(latents + step) - loss(latents - step)) / 2e-5
    torch.testing.assert_close(slope, plain.norm(), rtol=1e-6, atol=0)


def test_scaling_a_gradient_leaves_the_values():
    tensor = torch.randn(2, 5)
    assert torch.equal(scale_gradient(tensor, torch.tensor([-3.0, 0.0])), tensor)


def test_the_classifier_learns_to_tell_flat_from_textured_latents():
    """Although only one in five is flat, and AdamW gets scaled gradients."""
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


def test_uncounted_samples_have_no_gradient_and_undrawn_domains_a_finite_one():
    logits = torch.zeros(2, requires_grad=True)
    domain_loss(logits, torch.tensor([0, 1]), torch.tensor([False, True]), 0.0).sum().backward()
    assert logits.grad[0] == 0
    assert torch.isfinite(logits.grad[1])
    assert logits.grad[1] != 0


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 7), (21, 12, 20)])
def test_the_classifier_takes_any_size_and_computes_in_fp32_under_autocast(size):
    classifier = tiny_classifier()
    latents, sigmas = inputs(size=size)
    strength = torch.zeros(3)
    expected = classifier(latents, sigmas, strength)
    assert expected.shape == (3,)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(latents, sigmas, strength), expected)
    assert not torch.equal(classifier(latents, sigmas.flip(0), strength), expected)


def test_the_classifier_is_small_at_wans_size():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DomainClassifier().parameters())
    assert 1e5 < count < 3e5


# -------------------------------------------------------------------------------------------- the model with adversary

STRENGTH = torch.tensor([0.0, 0.5])


def tiny_model():
    return WithAdversary(tiny_c2r_transformer(trained=True), DomainClassifier(LATENT_CHANNELS, width=8)).train()


def loss_of(output):
    return output.sample.square().mean() + output.domain_logits.square().mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_classifier_gets_the_predicted_latents(checkpointing):
    model = tiny_model()
    if checkpointing:
        model.enable_gradient_checkpointing()
    noisy_latents, timesteps, *conditions = tiny_inputs()
    output = model(noisy_latents, timesteps, *conditions, reversal_strength=STRENGTH)
    assert torch.equal(output.sample, model.model(noisy_latents, timesteps, *conditions).sample)
    sigmas = timesteps / 1000
    latents = noisy_latents - sigmas.view(-1, 1, 1, 1, 1) * output.sample
    torch.testing.assert_close(output.domain_logits, model.domain_classifier(latents, sigmas, STRENGTH))

    def moved(index):
        """Absolute sums of the gradients of control branch and classifier from one sample's logit."""
        model.zero_grad()
        output.domain_logits[index].backward(retain_graph=True)
        return [
            sum(p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None)
            for part in (model.controlnet, model.domain_classifier)
        ]

    assert moved(0)[0] == 0  # strength 0
    assert min(moved(0)[1], *moved(1)) > 0


def test_without_reversal_strength_the_classifier_is_left_out():
    model, inputs = tiny_model(), tiny_inputs()
    model.domain_classifier = None
    output = model(*inputs)
    assert output.domain_logits is None
    assert torch.equal(output.sample, model.model(*inputs).sample)


def test_the_wrapper_delegates_to_the_joined_model():
    model = tiny_model()
    joined = model.model
    assert (model.config, model.dtype, model.device) == (joined.config, joined.dtype, joined.device)
    assert (model.transformer, model.controlnet) == (joined.transformer, joined.controlnet)
    assert model._no_split_modules == joined._no_split_modules
    assert len(model.trainable_parameters()) == len(
        [*joined.trainable_parameters(), *model.domain_classifier.parameters()]
    )
    assert not any(module.training for module in model.transformer.modules())
    assert model.controlnet.training
    model.enable_gradient_checkpointing()
    assert joined.gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not joined.gradient_checkpointing
    assert not model.eval().controlnet.training


@pytest.mark.parametrize("domain_logits", [None, torch.ones(2)])
def test_the_output_is_a_pytree(domain_logits):
    """Engines look for tensors in a module's output by pytree."""
    output = AdversaryOutput(sample=torch.zeros(3), domain_logits=domain_logits)
    tensors, spec = pytree.tree_flatten(output)
    assert len(tensors) == (1 if domain_logits is None else 2)
    again = pytree.tree_unflatten(tensors, spec)
    assert again.sample is output.sample
    assert again.domain_logits is domain_logits


def test_ddp_gives_the_gradients_of_the_unwrapped_model(one_process):
    expected, model, inputs = tiny_model(), tiny_model(), tiny_inputs()
    model.load_state_dict(expected.state_dict())
    loss_of(expected(*inputs, reversal_strength=STRENGTH)).backward()
    loss_of(DistributedDataParallel(model)(*inputs, reversal_strength=STRENGTH)).backward()
    for wrapped, plain in zip(model.trainable_parameters(), expected.trainable_parameters(), strict=True):
        torch.testing.assert_close(wrapped.grad, plain.grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fsdp2_gives_the_output_and_gradients_of_the_whole_model(shard, checkpointing):
    expected, model, inputs = tiny_model(), tiny_model(), tiny_inputs()
    model.load_state_dict(expected.state_dict())
    expected_output = expected(*inputs, reversal_strength=STRENGTH)
    loss_of(expected_output).backward()
    if checkpointing:
        model.enable_gradient_checkpointing()
    shard(model)
    output = model(*inputs, reversal_strength=STRENGTH)
    loss_of(output).backward()
    torch.testing.assert_close(output.sample, expected_output.sample)
    torch.testing.assert_close(output.domain_logits, expected_output.domain_logits)
    for sharded, whole in zip(model.trainable_parameters(), expected.trainable_parameters(), strict=True):
        torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)
