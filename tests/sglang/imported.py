"""What a prepared server has imported before it begins."""

import sglang.srt.entrypoints.http_server
import sglang.srt.models.registry  # noqa: F401

import lmcache.integration.sglang.unified_lmcache_mp_connector  # noqa: F401
