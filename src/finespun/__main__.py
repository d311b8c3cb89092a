"""`python -m finespun` is `finespun`."""

from finespun.cli import main

main()
