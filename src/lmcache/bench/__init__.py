"""What the cache costs, measured against the least it could cost: ``lmcache bench``.

A module a subject, each with one function from :class:`~lmcache.bench.settings.Settings` to rows.
"""
