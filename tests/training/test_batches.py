from c2r.sampler import MixedCGRealSampler
from c2r.training.batches import TrainBatches
from tests.helpers.options import options
from tests.helpers.runs import run_of


def batches_of(bucket_numbers):
    run = run_of(options(["--buckets", "5x32x48", "9x32x48", "--train_batch_size=4", "--dataloader_num_workers=0"]))
    clips = [{"index": i} for i in range(len(bucket_numbers))]
    sampler = MixedCGRealSampler(clips, [], cg_ratio=0, batch_size=4, buckets=bucket_numbers)
    return run, sampler, TrainBatches(run, clips, sampler)


def test_buckets_smaller_than_a_batch_are_reported(capsys):
    batches_of([0] * 4 + [1] * 4)
    assert "fewer" not in capsys.readouterr().out
    batches_of([0] * 4 + [1] * 3)
    line = capsys.readouterr().out
    assert "bucket 9x32x48: its 3 clips are fewer than a batch over all processes, 4" in line


def test_a_step_takes_one_batch_per_micro_step():
    run, sampler, batches = batches_of([0] * 8)
    for step in range(3):
        taken = list(batches.of_one_step())
        assert len(taken) == 2  # accumulation 2
        assert sorted(number for draw, _ in taken for number in draw.numbers) == list(range(8 * step, 8 * step + 8))
        assert {(draw.first_of_step, draw.samples_per_step) for draw, _ in taken} == {(8 * step, 8)}
        assert sorted(index for _, batch in taken for index in batch["index"].tolist()) == list(range(8))  # an epoch
        assert sampler.state_dict()["position"]["batches"] == 2 * (step + 1)
        run.progress.global_step += 1
    assert 0 < run.timings.spent["waiting for data"] < 60
    assert "% waiting for data" in run.timings.shares()
