"""`python -m eckart.cli`."""

from eckart.cli import main

main()
