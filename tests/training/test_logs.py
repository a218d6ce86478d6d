from argparse import Namespace

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from c2r.training.logs import start_logs
from c2r.training.progress import Progress
from tests.helpers.commands import scalars


def test_what_is_logged_again_after_a_resume_is_in_the_curve_once(tmp_path):
    def start(progress, again):
        project = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path / "logs"))
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_config=project)
        start_logs(accelerator, Namespace(), progress, again)
        return accelerator

    accelerator = start(Progress(), again=True)
    for step in range(1, 6):  # the last one was not saved
        accelerator.log({"train/loss": float(step)}, step)
    accelerator.end_training()
    # Saved at step 4 by a signal before its validation, which two resumed runs make up for; the first is killed then.
    for _ in range(2):
        accelerator = start(Progress(global_step=4, logs={"train/loss": 4.0}), again=True)
        accelerator.log({"validation/loss": 0.5}, 4)
        accelerator.end_training()
    assert scalars(tmp_path) == {"train/loss": [1, 2, 3, 4], "validation/loss": [0.5]}
