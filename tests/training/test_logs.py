from argparse import Namespace

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from c2r.training.logs import start_logs
from c2r.training.run import LoopState
from tests.helpers.commands import scalars


def test_what_is_logged_again_after_a_resume_is_in_the_curve_once(tmp_path):
    def start(loop):
        project = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path / "logs"))
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_config=project)
        start_logs(accelerator, Namespace(validation_steps=2, max_train_steps=9), loop)
        return accelerator

    accelerator = start(LoopState())
    for step in range(1, 6):  # the last one was not saved
        accelerator.log({"train/loss": float(step)}, step)
    accelerator.end_training()
    # Saved at step 4 by a signal before its validation, which two resumed runs make up for; the first is killed then.
    for _ in range(2):
        accelerator = start(LoopState(global_step=4, logs={"train/loss": 4.0}))
        accelerator.log({"validation/loss": 0.5}, 4)
        accelerator.end_training()
    assert scalars(tmp_path) == {"train/loss": [1, 2, 3, 4], "validation/loss": [0.5]}
