"""``python -m dpdm``."""

from dpdm.cli import main

main()
