"""Print the commands.

python -m c2r
"""

from c2r.options import COMMANDS


def main():
    width = max(len(command.prog) for command in COMMANDS)
    for command in COMMANDS:
        print(f"{command.prog:{width}}  {command.description}")


if __name__ == "__main__":
    main()
