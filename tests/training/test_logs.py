from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from c2r.training.logs import start_logs
from c2r.training.progress import Progress
from tests.helpers.commands import scalars
from tests.helpers.options import options


def test_steps_logged_twice_around_a_resume_appear_once_in_the_curve(tmp_path):
    def start(progress, again):
        project = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path / "logs"))
        accelerator = Accelerator(cpu=True, project_config=project)
        start_logs(accelerator, options([f"--output_dir={tmp_path}"]), progress, again)
        return accelerator

    accelerator = start(Progress(), again=True)
    for step in range(1, 6):  # no checkpoint holds step 5
        accelerator.log({"train/loss": float(step)}, step)
    accelerator.end_training()
    # A signal saved step 4 before its validation. Two resumed runs validate it; the first of them is then killed.
    for _ in range(2):
        accelerator = start(Progress(global_step=4, logs={"train/loss": 4.0}), again=True)
        accelerator.log({"validation/loss": 0.5}, 4)
        accelerator.end_training()
    assert scalars(tmp_path) == {"train/loss": [1, 2, 3, 4], "validation/loss": [0.5]}
