"""Print all options of all commands as Markdown: docs/options.md."""

from c2r.options import COMMANDS, PHASE1, PHASE2
from c2r.options.option import FROM_COMMAND_LINE
from c2r.options.types import Flag


def _default_text(option):
    if option.required:
        return "required"
    if option.default is None or option.default is False or isinstance(option.type, Flag):
        return ""
    return option.default_text


def markdown() -> str:
    """Return the page of all options."""
    lines = [
        "# Options",
        "",
        "All options of all commands. `--help` shows the common ones (bold here), `--help-all` shows all. A YAML file "
        "given by `--config` can set any option of the training scripts; the command line wins. A resumed run takes "
        "all options from its command line, except where the last column says otherwise, and prints those that "
        "differ. This page is printed by `python -m c2r.options`.",
    ]
    for command in COMMANDS:
        lines += ["", f"## {command.prog}", "", command.description]
        training = command in (PHASE1, PHASE2)
        for group, options in command.groups.items():
            lines += ["", f"**{group}**" if len(command.groups) > 1 else "", ""]
            lines += [
                "| option | value | default | |" + " on resume |" * training,
                "|---|---|---|---|" + "---|" * training,
            ]
            for option in options:
                name = f"**`--{option.name}`**" if option.common else f"`--{option.name}`"
                row = f"| {name} | {option.type} | {_default_text(option)} | {option.help} |"
                changed = "" if option.on_resume == FROM_COMMAND_LINE else option.on_resume
                lines.append(f"{row} {changed} |" if training else row)
    return "\n".join(line for line, after in zip(lines, [*lines[1:], None]) if line or after) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
