"""`python -m hamux` is `hamux-demo`."""

from hamux.cli import hamux_demo

raise SystemExit(hamux_demo())
