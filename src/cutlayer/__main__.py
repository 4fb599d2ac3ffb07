"""``python -m cutlayer``: the command line."""

from cutlayer.cli.main import main

if __name__ == "__main__":
    main()
