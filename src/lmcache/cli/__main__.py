"""``python -m lmcache.cli``: the command without its script."""

from lmcache.cli.main import app

app()
