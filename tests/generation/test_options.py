"""Options of c2r.generate: those not given are those of the training, and one line for those that do not fit."""

from dataclasses import replace

import pytest

from c2r import InputError, cli
from c2r.generation.options import check_options, complete_options
from c2r.models.contract import DEFAULT_FORMAT, PhaseContract
from c2r.options import GENERATE
from tests.helpers.trained import FRAMES, SIZE

CONTRACT = PhaseContract(
    phase=2,
    base_model="base",
    step=30,
    **SIZE,
    flow_shift=2.0,
    conditioning_scale=0.9,
    backbone="phase1/best",
    backbone_sha256="ab12",
    dinov3="dinov3",
)


def completed(*words, contract=CONTRACT):
    """Options of a command line, as the command checks and completes them."""
    args = cli.parse(GENERATE, ["--model=phase2/best", "--prompt=the street", "--output=out.mp4", *words])
    check_options(args)
    complete_options(args, contract)
    return args


def test_options_not_given_are_those_of_training():
    trained = SIZE | {"flow_shift": 2.0, "conditioning_scale": 0.9, "window_frames": FRAMES}
    models = {"pretrained_model_name_or_path": "base", "backbone": "phase1/best", "dinov3": "dinov3"}
    assert vars(completed()).items() >= (trained | models).items()
    given = {"height": 64, "width": 64, "fps": 4.0, "flow_shift": 5.0, "conditioning_scale": 0.0, "backbone": "moved"}
    assert vars(completed(*(f"--{name}={value}" for name, value in given.items()))).items() >= given.items()


def test_an_old_contract_without_a_format_has_that_of_wan():
    old = replace(CONTRACT, flow_shift=None, conditioning_scale=None, **dict.fromkeys(SIZE))
    expected = DEFAULT_FORMAT | {"flow_shift": 3.0, "conditioning_scale": 1.0, "window_frames": 81}
    assert vars(completed(contract=old)).items() >= expected.items()


def guidance(*words, contract):
    args = completed(*words, contract=contract)
    return args.guidance, args.guidance_scale, args.control_guidance_scale


def test_guidance_is_that_of_the_samples_of_training():
    contract = replace(CONTRACT, guidance="cfg", guidance_scale=2.0, control_guidance_scale=1.5)
    assert guidance(contract=contract) == guidance("--guidance=cfg", contract=contract) == ("cfg", 2.0, 1.5)
    assert guidance("--guidance_scale=4", "--control_guidance_scale=1", contract=contract) == ("cfg", 4.0, 1.0)
    # The scale of one kind says nothing about the other.
    assert guidance("--guidance=apg", contract=contract) == ("apg", 10.0, 1.5)
    assert guidance(contract=CONTRACT) == ("apg", 10.0, 1.0)
    with pytest.raises(InputError, match="--model phase2/best: its contract has guidance sag: "):
        guidance(contract=replace(contract, guidance="sag"))


def test_the_contracts_length_is_checked_as_a_window_too():
    contract = replace(CONTRACT, num_frames=6)
    with pytest.raises(InputError, match=r"its contract has num_frames 6: .*4k \+ 1"):
        completed("--num_frames=5", contract=contract)
    given = completed("--num_frames=5", "--window_frames=9", contract=contract)
    assert (given.num_frames, given.window_frames) == (5, 9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_frames=all"], "--num_frames all: needs a --control_video"),
        (["--fps=control"], "--fps control: needs the rate of a --control_video"),
        (["--num_frames=some"], "--num_frames some: "),
        (["--num_frames=9", "--window_overlap=5"], "--window_overlap 5: not below --window_frames 5; lower it"),
        (["--window_frames=6"], "--window_frames 6: "),
    ],
)
def test_lengths_that_cannot_be_are_one_line(words, message):
    with pytest.raises(InputError, match=message) as error:
        completed(*words)
    assert "\n" not in str(error.value)
