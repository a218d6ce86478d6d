"""Options: precedence, errors of one line, help, and the lists that docs and libraries share with them."""

import errno
import re
import subprocess
import sys

import pytest
from diffusers.optimization import SchedulerType
from tqdm import tqdm

from c2r import InputError, cli, flow_matching, guidance
from c2r.options import APP, COMMANDS, ESTIMATE, GENERATE, PHASE1, PHASE2, PREPARE, REPORT
from c2r.options.__main__ import markdown
from c2r.options.presets import PRESETS, option_words, preset_line
from c2r.options.shared import GUIDANCE_SCALES
from c2r.options.training import LR_SCHEDULERS, WEIGHTING_SCHEMES
from c2r.options.types import Choice, Number
from c2r.training.engine import check_options
from c2r.training.resume import saved_options
from tests.helpers.commands import ENVIRONMENT, ROOT
from tests.helpers.options import options, phase2_options

PHASE2_REQUIRED = ["--real_dataset=r", "--cg_dataset=c", "--output_dir=o", "--resume_backbone_from=b"]


def test_command_line_wins_over_config_over_defaults(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("lr_warmup_steps: 1e1\nadam_epsilon: 1e-5\nheight: 64\ndry_run: false\n")
    with pytest.raises(InputError, match="--lr_warmup_steps 1e1: not a whole number"):
        options(["--config", str(config)])
    config.write_text("adam_epsilon: 1e-5\nheight: 64\nreal_dataset: other\ndry_run: false\n")
    args = options(["--config", str(config), "--height", "32"])
    assert args.adam_epsilon == 1e-5  # YAML reads 1e-5 as text
    assert args.height == 32
    assert args.width == 832
    assert args.dry_run is False
    assert args.real_dataset == ["data"]


def test_config_values_are_read_as_on_the_command_line(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("mixed_precision: no\nema_decay: null\ncache_dir: 2024\ndry_run: True\nreal_dataset: [a, b:2]\n")
    args = options(["--config", str(config)])
    assert (args.mixed_precision, args.ema_decay, args.cache_dir, args.dry_run) == ("no", None, "2024", True)
    assert cli.parse(PHASE1, ["--config", str(config), "--output_dir=o"]).real_dataset == ["a", "b:2"]


def test_config_can_give_required_options(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("real_dataset: a\noutput_dir: b\n")
    args = cli.parse(PHASE1, ["--config", str(config)])
    assert (args.real_dataset, args.output_dir) == (["a"], "b")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("hieght: 64", "--hieght: no such option; did you mean --height?"),
        ("cg_dataset: a", "--cg_dataset: is an option of train_phase2.py"),
        ("height: tall", "--height tall"),
        ("dry_run: 3", "--dry_run 3: not true or false"),
        ("gradient_checkpointing: false", "--gradient_checkpointing false: not one of the choices; give none, block"),
        ("lr_scheduler: cosin", "--lr_scheduler cosin: not one of the choices; give linear, cosine"),
        ("- a list", "option: value"),
        ("", "option: value"),
        ("seed: 1\nseed: 2", "--seed is set twice"),
        ("checkpointing_steps: 2.5", "--checkpointing_steps 2.5: not a whole number"),
        ("height: null", "--height null: has no value"),
        ("real_dataset: []", "--real_dataset []: has no value"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_config_is_one_line(tmp_path, text, part):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(InputError, match=re.escape(part)) as error:
        options(["--config", str(config)])
    assert "\n" not in str(error.value)
    assert str(config) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("height", "100"),
        ("width", "0"),
        ("num_frames", "16"),
        ("buckets", "81x480"),
        ("train_batch_size", "0"),
        ("max_train_steps", "-1"),
        ("fps", "0"),
        ("fps", "inf"),
        ("flow_shift", "nan"),
        ("prompt_dropout", "1.5"),
        ("learning_rate", "-1"),
        ("checkpoints_total_limit", "0"),
        ("save_every_minutes", "0"),
        ("save_before_timeout", "soon"),
        ("save_before_timeout", "5"),
        ("ema_decay", "1"),
        ("max_skipped_steps", "-1"),
        ("max_dropped", "2"),
        ("distributed_timeout_minutes", "0"),
        ("optimizer", "sgd"),
    ],
)
def test_a_bad_value_is_answered_with_option_value_reason_and_remedy(name, value):
    with pytest.raises(InputError, match=rf"^--{name} {re.escape(value)}: .+; .+"):
        options([f"--{name}={value}"])


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Number(), "a number"),
        (Number(least=1, whole=True), "a whole number of at least 1"),
        (Number(least=0, most=1), "a number from 0 to 1"),
        (Number(least=0, below=1), "a number of at least 0 and below 1"),
        (Number(above=0), "a number above 0"),
        (Number(above=0, below=1), "a number between 0 and 1"),
    ],
)
def test_a_number_states_both_of_its_bounds(number, text):
    assert str(number) == text


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_durations_are_read_in_seconds(text, seconds, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000000")
    assert options([f"--save_before_timeout={text}"]).save_before_timeout == seconds


def test_a_slot_of_unknown_end_is_refused(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    with pytest.raises(InputError, match="SLURM_JOB_END_TIME"):
        options(["--save_before_timeout=5m"])


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("--real_datasets=x", "--real_datasets: no such option; did you mean --real_dataset?"),
        ("--cg_ratio=x", "--cg_ratio: is an option of train_phase2.py; leave it out here, see --help-all"),
        ("--xyzzy", "--xyzzy: no such option; see --help-all"),
        ("--seed", "--seed: has no value; give a whole number from 0 to 2,147,483,647"),
        ("--dry_run=3", "--dry_run: ignored explicit argument '3'; see --help"),
    ],
)
def test_an_unknown_or_misplaced_option_is_answered_with_the_nearest(argument, answer):
    with pytest.raises(InputError, match=f"^{re.escape(answer)}$"):
        options([argument])


def test_a_missing_option_and_a_stray_word_are_named():
    with pytest.raises(InputError, match=r"^--output_dir: missing; give a folder$"):
        cli.parse(PHASE1, ["--real_dataset=x"])
    with pytest.raises(InputError, match=r"^word: not an option"):
        cli.parse(PHASE1, ["word", "--real_dataset=x", "--output_dir=o"])


@pytest.mark.parametrize(
    ("command", "option", "first"),
    [(PREPARE, "dataset", ["a b"]), (APP, "model", ["a"]), (REPORT, "runs", ["a", "b"])],
)
def test_the_first_words_are_those_of_an_option(command, option, first, monkeypatch):
    for argv in (first, [f"--{option}", *first]):
        named = cli.name_first_words(option, argv)
        assert named == [f"--{option}", *first]
        given = getattr(cli.parse(command, named), option)
        assert given == (first if command.options[option].several else first[0])
        monkeypatch.setattr(sys, "argv", ["program", *argv])
        assert cli.name_first_words(option) == named
    assert cli.name_first_words(option, []) == []


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--cg_ratio_min=0.3"], "--cg_ratio_min 0.3: above --cg_ratio 0.2"),
        (["--adversarial_weight=0.1", "--cg_ratio=0"], "--adversarial_weight 0.1: needs samples of both domains"),
        (["--cache_control_features", "--control_augmentation=0.5"], "--control_augmentation 0.5: alters the control"),
        (["--buckets", "5x32x48", "5x32x48"], "--buckets 5x32x48: named twice; name it once"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(argv, part):
    cli.parse(PHASE2, PHASE2_REQUIRED)
    with pytest.raises(InputError, match=f"^{re.escape(part)}"):
        cli.parse(PHASE2, [*PHASE2_REQUIRED, *argv])


def test_a_share_of_cg_needs_cg_pairs():
    with pytest.raises(InputError, match=r"--cg_ratio 0\.2: needs CG pairs"):
        cli.parse(PHASE2, [argument for argument in PHASE2_REQUIRED if "cg" not in argument])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.prog)
def test_defaults_pass_their_own_checks(command):
    for option in command.options.values():
        if isinstance(option.type, Number | Choice) and option.default is not None:
            for default in option.default if option.several else [option.default]:
                assert option.type(str(default)) == default
        assert not (option.required and option.default is not None)


def test_choices_are_those_of_the_libraries_that_take_seconds_to_import():
    assert set(LR_SCHEDULERS) == {s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT}
    assert WEIGHTING_SCHEMES == flow_matching.WEIGHTING_SCHEMES
    assert GUIDANCE_SCALES == guidance.DEFAULT_GUIDANCE_SCALE


def test_help_shows_common_options_and_help_all_the_rest(capsys):
    def shown(argument):
        with pytest.raises(SystemExit) as ended:
            cli.parse(PHASE2, [argument])
        assert ended.value.code == 0
        return set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)) - {"help"}

    common, everything = shown("--help"), shown("--help-all")
    assert everything == set(PHASE2.options)
    assert common == {option.name for option in PHASE2.options.values() if option.common}
    assert len(common) <= 30
    assert {"real_dataset", "cg_ratio"} <= common
    assert not common & {"adam_beta1", "logit_std", "distributed_timeout_minutes"}


@pytest.mark.parametrize("argument", ["--help", "--real_datasets=x", "--seed=x"])
@pytest.mark.parametrize("script", ["train_phase1.py", "train_phase2.py"])
def test_scripts_answer_before_they_import_torch(script, argument):
    trace = "import sys, runpy; sys.argv = sys.argv[1:]\n"
    trace += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    trace += "finally: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", trace, script, argument], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == (0 if argument == "--help" else 1)
    assert "False" in done.stderr
    if argument != "--help":
        assert done.stderr.splitlines()[-1].startswith(f"error: {argument.partition('=')[0]}")


def test_docs_list_all_options():
    assert (ROOT / "docs/options.md").read_text() == markdown(), "run python -m c2r.options > docs/options.md"


def test_repeatable_options_are_lists():
    args = cli.parse(GENERATE, ["--model=m", "--output=o.mp4", "--prompt=a", "--prompt=b"])
    assert args.prompt == ["a", "b"]
    assert args.control_video is None


@pytest.mark.parametrize("error", [InputError("a.mp4: unreadable"), OSError(errno.ENOSPC, "No space left", "a.mp4")])
def test_an_error_line_stands_alone(error, capsys, signal_handlers):
    def main():
        bar = tqdm(total=2)
        bar.update()
        raise error

    with pytest.raises(SystemExit, match=r"^error: a\.mp4: "):
        cli.run(main)
    assert capsys.readouterr().err.endswith("\n")  # the bar is closed, though the error still holds its frame


# ------------------------------------------------------------------------------------------------------------- presets


def typed_out(phase: str, name: str) -> list[str]:
    return option_words(PRESETS[phase][name]).split()


EVERY_PRESET = [(phase, name) for phase, presets in PRESETS.items() for name in presets]


@pytest.mark.parametrize(("phase", "name"), EVERY_PRESET)
def test_a_preset_stands_for_its_options(phase, name):
    """A run that is resumed with the options themselves, or the other way round, sees no change."""
    parse = phase2_options if phase == "2" else parse_phase1
    preset, typed = parse([f"--preset={name}"]), parse(typed_out(phase, name))
    assert preset.preset == name
    assert saved_options(preset) == saved_options(typed)
    assert preset_line(preset) == f"--preset {name} sets {option_words(PRESETS[phase][name])}"
    check_options(preset, None, 2)  # of the engine: DDP


def parse_phase1(argv):
    return cli.parse(PHASE1, ["--real_dataset=r", "--output_dir=o", *argv])


def test_given_options_win_over_a_preset(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("preset: 12gb\nffn_chunks: 1\noffload_backbone: false\n")
    args = phase2_options(["--config", str(config), "--optimizer=adamw", "--no-offload_activations"])
    assert (args.preset, args.weight_storage) == ("12gb", "bf16")
    assert (args.ffn_chunks, args.offload_backbone) == (1, False)
    assert (args.optimizer, args.offload_activations) == ("adamw", False)
    assert preset_line(args).endswith(
        "sets --weight_storage bf16; given otherwise: --ffn_chunks 1 --no-offload_activations "
        "--no-offload_backbone --optimizer adamw"
    )
    args = phase2_options(["--config", str(config), "--preset=16gb"])
    assert args.preset == "16gb"


def test_a_given_batch_keeps_the_presets_from_changing_the_clips_of_a_step():
    for given, expected in (
        ([], (1, 32)),
        (["--train_batch_size=2"], (2, 8)),
        (["--gradient_accumulation_steps=16"], (4, 16)),
    ):
        args = parse_phase1(["--preset=24gb", *given])
        assert (args.train_batch_size, args.gradient_accumulation_steps) == expected


def test_a_conflict_with_a_preset_names_what_the_preset_has_set():
    with pytest.raises(
        InputError, match=r"^--compile: .*; --preset 16gb has set --ffn_chunks 4 --optimizer adamw8bit$"
    ):
        phase2_options(["--preset=16gb", "--compile"])


def test_a_phase_refuses_presets_of_the_other():
    with pytest.raises(InputError, match="--preset 12gb: not one of the choices; give 16gb, "):
        parse_phase1(["--preset=12gb"])
    with pytest.raises(InputError, match="--preset 12gb: phase 1 has none of this name; give one of 16gb, "):
        cli.parse(ESTIMATE, ["--phase=1", "--preset=12gb"])
    assert cli.parse(ESTIMATE, ["--preset=12gb"]).offload_backbone
