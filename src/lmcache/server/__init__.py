"""One cache for many processes of a host: ``lmcache server``, and what engines attach to it with."""
