"""`python -m jobs …` is `smolvlm …`, for where the package is a folder and not installed."""

from jobs.cli import main

main()
