"""`python -m anyrank` is the command `anyrank`."""

from anyrank.cli import main

main()
