"""C2RTransformer: bit-identical backbone output, residuals after the right blocks, gradients of the control only."""

import pytest
import torch

from c2r.models import checkpointing as checkpointing_module
from c2r.models.controlnet import C2RControlBlock
from c2r.models.transformer import C2RTransformer
from tests.helpers.tiny import tiny_c2r_transformer, tiny_inputs, tiny_transformer


def backbone_output(model, noisy_latents, timesteps, prompt_embeds):
    return model.transformer(noisy_latents, timesteps, prompt_embeds, return_dict=False)[0]


@pytest.mark.parametrize("conditioning_scale", [1.0, 0.0, -0.7, 30, torch.tensor([0.3, 0.0])])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_control_keeps_the_backbones_output_bit_for_bit(dtype, checkpointing, conditioning_scale):
    model = tiny_c2r_transformer(control_layers=2, control_stride=2).to(dtype)
    noisy_latents, timesteps, prompt_embeds, control_features = tiny_inputs(dtype=dtype)
    expected = backbone_output(model, noisy_latents, timesteps, prompt_embeds)
    if checkpointing:
        model.enable_gradient_checkpointing()

    velocity_pred = model(noisy_latents, timesteps, prompt_embeds, control_features, conditioning_scale).sample

    assert velocity_pred.requires_grad  # so checkpointing had something to do
    assert velocity_pred.dtype == dtype
    assert torch.equal(velocity_pred, expected)
    without_control = model(noisy_latents, timesteps, prompt_embeds, None, conditioning_scale).sample
    assert torch.equal(without_control, expected)


def test_without_features_a_trained_control_has_no_effect():
    model = tiny_c2r_transformer(trained=True)
    noisy_latents, timesteps, prompt_embeds, control_features = tiny_inputs()
    expected = backbone_output(model, noisy_latents, timesteps, prompt_embeds)
    assert torch.equal(model(noisy_latents, timesteps, prompt_embeds).sample, expected)
    assert not torch.equal(model(noisy_latents, timesteps, prompt_embeds, control_features).sample, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fp32_control_and_bf16_backbone_run_together_under_autocast(tmp_path, checkpointing):
    model = tiny_c2r_transformer()
    model.transformer.save_pretrained(tmp_path)
    # from_pretrained leaves time embedder, norms and modulation tables in fp32, unlike `.to(torch.bfloat16)`
    model.transformer = type(model.transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    model.transformer.requires_grad_(False)
    assert {p.dtype for p in model.controlnet.parameters()} == {torch.float32}
    assert {p.dtype for p in model.transformer.parameters()} == {torch.float32, torch.bfloat16}
    if checkpointing:
        model.enable_gradient_checkpointing()
    noisy_latents, timesteps, prompt_embeds, control_features = tiny_inputs()  # fp32, as the training loop has them

    with torch.autocast("cpu", torch.bfloat16):
        expected = backbone_output(model, noisy_latents, timesteps, prompt_embeds.bfloat16())
        velocity_pred = model(noisy_latents, timesteps, prompt_embeds.bfloat16(), control_features.bfloat16()).sample
    velocity_pred.float().square().mean().backward()

    assert torch.equal(velocity_pred, expected)
    last = model.controlnet.control_blocks[1].projector[2]
    assert last.weight.grad.dtype == torch.float32
    assert last.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("control_layers", "control_stride"), [(4, 1), (2, 1), (2, 3), (1, 1)])
def test_residuals_are_added_after_their_blocks(control_layers, control_stride):
    """Compare with hooks on the backbone's own forward, and with a control branch that runs before the backbone."""
    model = tiny_c2r_transformer(control_layers, control_stride, trained=True)
    noisy_latents, timesteps, prompt_embeds, control_features = tiny_inputs()
    scale = 0.6
    backbone, controlnet = model.transformer, model.controlnet

    seen = []
    first = backbone.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    backbone_output(model, noisy_latents, timesteps, prompt_embeds)
    first.remove()
    _, *shared = seen[0]
    state = controlnet.control_adapter(control_features, (2, 3, 2))
    hooks = []
    for index, control_block in zip(range(0, 4, control_stride), controlnet.control_blocks):
        state, residual = control_block(state, *shared)
        hooks.append(
            backbone.blocks[index].register_forward_hook(lambda _, args, output, r=residual: output + scale * r)
        )
    expected = backbone_output(model, noisy_latents, timesteps, prompt_embeds)
    for hook in hooks:
        hook.remove()

    assert len(hooks) == control_layers
    assert torch.equal(model(noisy_latents, timesteps, prompt_embeds, control_features, scale).sample, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_with_scale_zero_gets_the_backbones_output(dtype):
    model = tiny_c2r_transformer(trained=True).to(dtype)
    noisy_latents, timesteps, prompt_embeds, control_features = tiny_inputs(batch_size=3, dtype=dtype)
    scales = torch.tensor([1.0, 0.0, 0.7])
    velocity_pred = model(noisy_latents, timesteps, prompt_embeds, control_features, scales).sample
    expected = backbone_output(model, noisy_latents, timesteps, prompt_embeds)
    assert torch.equal(velocity_pred[1], expected[1])
    for sample, scale in ((0, 1.0), (2, 0.7)):  # and a tensor of scales means the same as floats
        alone = model(noisy_latents, timesteps, prompt_embeds, control_features, scale).sample
        assert torch.equal(velocity_pred[sample], alone[sample])
        assert not torch.equal(velocity_pred[sample], expected[sample])


@pytest.mark.parametrize("latent_frames", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 80), (48, 32)])
@pytest.mark.parametrize(("batch_size", "prompt_length"), [(1, 16), (3, 2)])
def test_any_size_and_length_runs_and_samples_do_not_mix(latent_frames, height, width, batch_size, prompt_length):
    model = tiny_c2r_transformer(trained=True)
    inputs = tiny_inputs(batch_size, latent_frames, height, width, prompt_length)
    with torch.no_grad():
        velocity_pred = model(*inputs).sample
        assert velocity_pred.shape == inputs[0].shape
        assert velocity_pred.isfinite().all()
        # each sample is its own: nothing leaks across the batch
        last = model(*(tensor[-1:] for tensor in inputs)).sample
    torch.testing.assert_close(velocity_pred[-1:], last, atol=1e-5, rtol=1e-4)


def test_a_blank_control_runs_through_the_branch():
    """Zero features, as of control dropout, give finite outputs and gradients, other than those without control."""
    model = tiny_c2r_transformer(trained=True)
    noisy_latents, timesteps, prompt_embeds, control_features = tiny_inputs()
    velocity_pred = model(noisy_latents, timesteps, prompt_embeds, torch.zeros_like(control_features)).sample
    velocity_pred.square().mean().backward()
    assert velocity_pred.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.trainable_parameters())
    assert not torch.equal(velocity_pred, model(noisy_latents, timesteps, prompt_embeds).sample)


def test_first_steps_train_every_control_parameter_and_no_other():
    model = tiny_c2r_transformer(control_layers=3)
    model.enable_gradient_checkpointing()
    model.train()
    inputs = tiny_inputs()
    target = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3)

    def step():
        """Take a step and return the names of the parameters with a gradient other than zero."""
        optimizer.zero_grad()
        (model(*inputs).sample - target).square().mean().backward()
        optimizer.step()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.count_nonzero() > 0}

    control = {name for name, _ in model.named_parameters() if name.startswith("controlnet.")}
    last = {name for name in control if ".projector.2." in name}
    # r = W2·gelu(W1·c) + b2 with W2 = 0: dL/dW2 and dL/db2 are not zero, but dL/dc = W1'·gelu'·W2'·dL/dr is, and so is
    # everything behind it (W1, the cloned block, the adapter) until the first update has moved W2.
    assert step() == last
    # From then on every control parameter learns, even the bias of the keys: softmax would cancel it, but an RMS norm
    # stands between.
    assert step() == control

    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("transformer."))
    assert all(not torch.equal(after[name], before[name]) for name in control)
    assert len(model.trainable_parameters()) == len(control)
    assert all(parameter.grad is None for parameter in model.transformer.parameters())


def test_train_leaves_the_backbone_in_eval_mode():
    model = tiny_c2r_transformer().train()
    assert model.controlnet.training
    assert not any(module.training for module in model.transformer.modules())


@pytest.mark.parametrize("control_stride", [1, 2])
def test_checkpointing_changes_no_gradient(control_stride):
    inputs = tiny_inputs()
    grads = []
    for checkpointing in (False, True):
        model = tiny_c2r_transformer(2, control_stride, trained=True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*inputs).sample.square().mean().backward()
        grads.append([parameter.grad for parameter in model.trainable_parameters()])
        assert all(grad is not None for grad in grads[-1])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*grads))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_graph_before_the_first_residual_and_recomputation_only_after_it(monkeypatch, checkpointing):
    model = tiny_c2r_transformer(control_layers=2, control_stride=2, trained=True)  # residuals after blocks 0 and 2
    if checkpointing:
        model.enable_gradient_checkpointing()
    runs, graph, checkpointed = {}, {}, []
    checkpoint = checkpointing_module.checkpoint

    def counted(block, *args, **options):
        checkpointed.append(block)
        return checkpoint(block, *args, **options)

    monkeypatch.setattr(checkpointing_module, "checkpoint", counted)
    for name, module in model.named_modules():
        if (name.startswith("transformer.blocks.") and name.count(".") == 2) or isinstance(module, C2RControlBlock):
            # Counted in a pre-hook, because a recomputation stops as soon as the backward pass has its inputs.
            def count(module, args, name=name):
                runs[name] = runs.get(name, 0) + 1

            def look(module, args, output, name=name):
                graph.setdefault(name, (output[0] if isinstance(output, tuple) else output).requires_grad)

            module.register_forward_pre_hook(count)
            module.register_forward_hook(look)
    model(*tiny_inputs()).sample.square().mean().backward()
    assert graph == {
        "transformer.blocks.0": False,
        "transformer.blocks.1": True,
        "transformer.blocks.2": True,
        "transformer.blocks.3": True,
        "controlnet.control_blocks.0": True,
        "controlnet.control_blocks.1": True,
    }
    assert len(checkpointed) == (5 if checkpointing else 0)
    assert runs == {name: 2 if checkpointing and has_graph else 1 for name, has_graph in graph.items()}


def test_without_autograd_nothing_is_checkpointed():
    model = tiny_c2r_transformer(trained=True)
    inputs = tiny_inputs()
    model.enable_gradient_checkpointing()
    with torch.no_grad():
        checkpointed = model(*inputs).sample
    model.disable_gradient_checkpointing()
    assert torch.equal(checkpointed, model(*inputs).sample)


def test_gradients_agree_with_finite_differences():
    """In float64, along a random direction of the control parameters."""
    model = tiny_c2r_transformer(control_layers=1, trained=True, num_layers=2)
    model.double()
    inputs = tiny_inputs(1, 1, 16, 16, 2, dtype=torch.float64)
    # diffusers' blocks compute in fp32 inside, so the difference quotient is only good to some 1e-3
    parameters = model.trainable_parameters()
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(parameters)]
    loss = model(*inputs).sample.square().mean()
    grads = torch.autograd.grad(loss, parameters)
    slope = sum((grad * along).sum() for grad, along in zip(grads, direction)).item()

    def loss_at(step):
        with torch.no_grad():
            for parameter, along in zip(parameters, direction):
                parameter += step * along
            loss = model(*inputs).sample.square().mean().item()
            for parameter, along in zip(parameters, direction):
                parameter -= step * along
        return loss

    step = 1e-4
    assert (loss_at(step) - loss_at(-step)) / (2 * step) == pytest.approx(slope, rel=1e-2)


def test_wrong_shapes_are_named():
    model = tiny_c2r_transformer()
    noisy_latents, timesteps, prompt_embeds, control_features = tiny_inputs()
    with pytest.raises(ValueError, match=r"noisy latents have shape \(2, 4, 2, 5, 4\)"):
        model(noisy_latents[:, :, :, :5], timesteps, prompt_embeds, control_features)
    with pytest.raises(ValueError, match=r"conditioning_scale has shape \(3,\)"):
        model(noisy_latents, timesteps, prompt_embeds, control_features, torch.ones(3))
    with pytest.raises(ValueError, match="4 frames, but 2 latent frames need 5"):
        model(noisy_latents, timesteps, prompt_embeds, control_features[:, :4])
    other = tiny_transformer(num_layers=5)
    with pytest.raises(ValueError, match="num_layers 4, this one has 5"):
        C2RTransformer(other, model.controlnet)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_trace_into_one_graph_each(checkpointing):
    """Compile by Dynamo and AOTAutograd without kernels; fullgraph raises at a graph break."""
    inputs = tiny_inputs()
    results = []
    for compiled in (False, True):
        model = tiny_c2r_transformer(trained=True, num_layers=2)
        if checkpointing:
            model.enable_gradient_checkpointing()
        if compiled:
            model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        velocity_pred = model(*inputs).sample
        velocity_pred.square().mean().backward()
        results.append([velocity_pred, *(parameter.grad for parameter in model.trainable_parameters())])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_blocks_compile_with_inductor():
    inputs = tiny_inputs()
    model = tiny_c2r_transformer(trained=True, num_layers=2)
    expected = model(*inputs).sample
    model.compile_repeated_blocks(fullgraph=True)
    velocity_pred = model(*inputs).sample
    velocity_pred.square().mean().backward()
    torch.testing.assert_close(velocity_pred, expected, atol=1e-4, rtol=1e-3)
    assert all(parameter.grad.isfinite().all() for parameter in model.trainable_parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backbone_dtype", [torch.float32, torch.bfloat16])
def test_fsdp2_gives_the_output_and_gradients_of_the_whole_model(shard, backbone_dtype, checkpointing):
    inputs = tiny_inputs()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=backbone_dtype == torch.bfloat16)
    expected, model = tiny_c2r_transformer(trained=True), tiny_c2r_transformer(trained=True)
    model.load_state_dict(expected.state_dict())
    for one in (expected, model):
        one.transformer.to(backbone_dtype)
    with autocast:
        expected_velocity = expected(*inputs).sample
    expected_velocity.square().mean().backward()
    if checkpointing:
        model.enable_gradient_checkpointing()
    shard(model)
    with autocast:
        velocity_pred = model(*inputs).sample
    velocity_pred.square().mean().backward()
    torch.testing.assert_close(velocity_pred, expected_velocity)
    for sharded, whole in zip(model.trainable_parameters(), expected.trainable_parameters(), strict=True):
        torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)
