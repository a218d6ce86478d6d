"""Compare phase 2 settings on the toy city: which of them bring control, and which bring a CG look.

    python -m c2r.study
    python -m c2r.study --only "cg 0.2" "latent injection" --seeds 2

Each run is a command that a user could type, with its own CG monitor; its sample videos are judged by measures that
share nothing with the models. An interrupted study continues where it was when it is started again. Results go to
results.csv, a line for each run, and are drawn in control.png and remedies.png. table.md, which is also printed, has
the means over the seeds, each setting's differences from its baseline, and how well probes predict whole runs.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from c2r import cli
from c2r.files import write_atomic
from c2r.options import STUDY
from c2r.toy.commands import require_clone


def main(argv: list[str] | None = None):
    args = cli.parse(STUDY, argv)
    require_clone()
    from c2r.toy.study_probes import probe_table
    from c2r.toy.study_results import draw_control, draw_remedies, read_results, study_tables, write_results
    from c2r.toy.study_runs import PROBE_STEPS, RATIOS, planned_runs, prepare, run_phase1, run_phase2, select_runs

    planned = planned_runs()
    runs = select_runs(planned, args.only)
    out = Path(args.output_dir)
    table = out / "results.csv"
    prepare(out)
    results = read_results(table)
    finished = {(result.run, result.seed) for result in results}
    run_phase1(out, 0)  # alone, because it encodes the clips for all others
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda seed: run_phase1(out, seed), range(1, args.seeds)))
        jobs = [(run, seed) for run in runs for seed in range(args.seeds) if (run.name, seed) not in finished]
        for result in pool.map(lambda job: run_phase2(out, *job), jobs):
            results.append(result)
            write_results(table, results)
            print(f"{result.run}, seed {result.seed}: {result.seconds} s", flush=True)
    draw_control(out / "control.png", results, RATIOS)
    baselines = {run.name: run.baseline for run in planned}
    draw_remedies(out / "remedies.png", results, baselines)
    text = study_tables(results, baselines)
    if probes := probe_table(results, RATIOS):
        text += f"\nWhole runs predicted from probes of {PROBE_STEPS} steps, root mean square errors:\n\n{probes}"
    write_atomic(out / "table.md", text.encode())
    print(text, end="")


if __name__ == "__main__":
    cli.run(main)
