"""`python -m planner` is the `moeplan` command."""

from planner.cli import main

main()
