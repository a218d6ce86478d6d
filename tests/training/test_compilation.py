"""--compile: the same training from compiled blocks, with one graph for all sizes of clips."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from c2r import InputError
from c2r.models.adversary import DomainClassifier, WithAdversary
from c2r.training import setup
from c2r.training.compilation import compile_blocks, require_compiler
from tests.helpers.commands import phase2, scalars, succeed, weights
from tests.helpers.forks import fork
from tests.helpers.options import options, phase2_options
from tests.helpers.runs import run_of
from tests.helpers.tiny import LATENT_CHANNELS, tiny_c2r_transformer, tiny_inputs, tiny_transformer

#: Buckets: latent frames, height, width.
BUCKETS = [(5, 64, 48), (3, 112, 64), (1, 96, 80)]


def models_of_phase(phase):
    """Return (model, backbone, trainable part)."""
    if phase == 1:
        transformer = tiny_transformer(num_layers=2)
        return transformer, transformer, transformer
    joined = tiny_c2r_transformer(control_layers=2, trained=True)
    return WithAdversary(joined, DomainClassifier(LATENT_CHANNELS, width=8)), joined.transformer, joined.controlnet


def train_on(state, bucket):
    """Return loss and gradients of one micro-batch of two clips."""
    frames, height, width = bucket
    inputs = tiny_inputs(latent_frames=frames, height=height, width=width, prompt_length=9)
    state.trainable.zero_grad()
    loss = state.model(*inputs[: 4 if state.domain_classifier else 3]).sample.float().square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in state.trainable.parameters())]


def build(phase, *argv):
    torch._dynamo.reset()
    model, backbone, trainable = models_of_phase(phase)
    classifier = model.domain_classifier if phase == 2 else None
    return setup.build_train_state(run_of(options(argv)), model, backbone, trainable, classifier)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "checkpointing"), [(1, "--gradient_checkpointing=none"), (2, "--gradient_checkpointing=block")]
)
def test_compiled_blocks_train_alike_and_no_bucket_compiles_twice(phase, checkpointing, monkeypatch):
    # Dynamo counts the same graphs as for Inductor, which takes minutes to call g++ for each.
    monkeypatch.setattr(setup, "compile_blocks", partial(compile_blocks, backend="eager"))
    eager = [train_on(build(phase, "--mixed_precision=no", checkpointing), bucket) for bucket in BUCKETS]
    state = build(phase, "--mixed_precision=no", checkpointing, "--compile")
    counters.clear()
    graphs = []
    for bucket, expected in zip([*BUCKETS, *BUCKETS], [*eager, *eager]):
        for found, wanted in zip(train_on(state, bucket), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] <= 4  # backbone's blocks before and after the first injection; control blocks
    first, second = graphs[: len(BUCKETS)], graphs[len(BUCKETS) :]
    assert second == [first[-1]] * len(BUCKETS)  # nothing is compiled after the first step of each bucket
    assert first[1] == first[0]  # sizes are variables; a graph more is for a bucket of one frame
    assert not counters["graph_break"]
    fresh = models_of_phase(phase)[2]
    assert state.trainable.state_dict().keys() == fresh.state_dict().keys()  # no _orig_mod.


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_and_names_of_a_plain_one(first, second, tiny_models, small_datasets, tmp_path):
    options = ["--compile", "--max_train_steps=4", "--num_samples=0"]
    succeed(*phase2(tiny_models, small_datasets, first[0] / "final", tmp_path, *options), by=fork)
    for tag in ("train/loss", "train/grad_norm", "validation/loss"):
        assert scalars(tmp_path)[tag] == pytest.approx(scalars(second[0])[tag], rel=1e-4)
    assert weights(tmp_path / "final").keys() == weights(second[0] / "final").keys()


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    require_compiler(torch.device("cpu"))

    def no_compiler():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    with pytest.raises(InputError, match=r"--compile: needs a C\+\+ compiler; install g\+\+"):
        require_compiler(torch.device("cpu"))


def test_a_device_that_inductor_has_no_code_for_is_named():
    with pytest.raises(InputError, match=r"--compile: torch\.compile has no code for mps; leave it out"):
        require_compiler(torch.device("mps"))


def test_blocks_are_compiled_where_they_stand():
    model = tiny_c2r_transformer()
    names = list(model.state_dict())
    compile_blocks(model)
    assert list(model.state_dict()) == names
    blocks = [*model.transformer.blocks, *model.controlnet.control_blocks]
    assert all(block._compiled_call_impl is not None for block in blocks)


@pytest.mark.parametrize(
    "option",
    ["--gradient_checkpointing selective", "--offload_activations", "--ffn_chunks 2", "--offload_backbone"],
)
def test_options_that_change_how_blocks_run_are_refused(option):
    with pytest.raises(InputError, match=f"--compile: is not tested with {option}; leave one of them out"):
        phase2_options(["--compile", *option.split()])


def test_selective_checkpointing_needs_torchs_attention():
    selective = ["--gradient_checkpointing=selective", "--attention_backend"]
    assert options([*selective, "_native_cudnn"])
    for backend in ("flash", "_native_math"):
        with pytest.raises(
            InputError, match=f"keeps the outputs of torch's own .* not of --attention_backend {backend}"
        ):
            options([*selective, backend])
