import train_phase2
from c2r import study
from c2r.options import parse_options
from c2r.toy import city
from c2r.toy.__main__ import write_toy

FIGURES = dict.fromkeys(study.FIGURES, 0.25)


def lines_of(*names):
    return [
        {"run": name, "seed": seed} | FIGURES | {"cg_texture": None, "seconds": 7} for name in names for seed in (0, 1)
    ]


def test_every_planned_run_is_a_command(tmp_path):
    for options in study.planned_runs().values():
        options = study.OPTIONS | options
        given = [f"--{name}={value}" for name, value in options.items() if name != "backbone"]
        required = ["--resume_backbone_from=b", "--real_dataset=r", f"--output_dir={tmp_path}"]
        args = parse_options(train_phase2.build_parser(), [*given, *required])
        assert all(getattr(args, name) == value for name, value in options.items() if name != "backbone")


def test_results_come_back_as_they_were_written(tmp_path):
    assert study.read_results(tmp_path / "results.csv") == []
    lines = lines_of("cg 0.1", "cg 0.5, controller")
    study.write_results(tmp_path / "results.csv", lines)
    assert study.read_results(tmp_path / "results.csv") == lines
    assert study.of_run(lines, "cg 0.1", "loss") == [0.25, 0.25]
    assert study.of_run(lines, "cg 0.1", "cg_texture") == []


def test_pictures_of_a_study_that_is_not_done(tmp_path):
    lines = lines_of("cg 0.1", "cg 0.5", "cg 0.5, no phase 1")
    for draw in (study.draw_control, study.draw_remedies):
        draw(lines, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_cg_captions_tell_of_weather(tmp_path):
    write_toy(tmp_path, num_real=2, num_cg=2)
    metadata = tmp_path / "data/cg/train/metadata.csv"
    assert "cg render" in metadata.read_text()
    for _ in range(2):  # a study that is started again does it again
        study.caption_like_real(tmp_path / "data/cg")
        header, *rows = metadata.read_text().splitlines()
        assert header == "file_name,control_name,text"
        caption = city.caption(city.make_scene(2_000_001))
        assert rows[1] == f'2000001_fine.mp4,2000001_coarse.mp4,"{caption}"'
