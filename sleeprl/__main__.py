"""``python -m sleeprl``: the command."""

from sleeprl.cli import main

if __name__ == "__main__":
    main()
