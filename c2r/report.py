"""Write one HTML page on one or several runs, finished or running: curves, comparison, samples, options.

    python -m c2r.report outputs/phase2
    python -m c2r.report outputs/phase2 outputs/phase2_augmented --output report.html

The page has everything in it and loads nothing from elsewhere. Runs are compared clip by clip with the first one.
"""

from pathlib import Path

from c2r import InputError, cli
from c2r.options import REPORT


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    args = cli.parse(REPORT, cli.name_first_words("runs", argv))
    output = Path(args.output)
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder; give the name of a file, such as {output / 'report.html'}")

    from c2r.files import write_atomic
    from c2r.reporting.page import report_page
    from c2r.reporting.run_folder import RunFolder, run_names
    from c2r.units import size_text

    runs = [RunFolder.read(path, name) for path, name in zip(args.runs, run_names(args.runs))]
    page = report_page(runs).encode()
    write_atomic(output, page)
    for run in runs:
        print(f"{run.name}: {run.status}")
        for line in run.missing:
            print(f"{run.name}: has no {line}")
    print(f"{output}: {size_text(len(page))}; open it in a browser")


if __name__ == "__main__":
    cli.run(main)
