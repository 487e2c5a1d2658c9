"""``python -m tessella``: the command line."""

from tessella.cli import main

main()
