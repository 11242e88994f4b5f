"""What a request may say about its own blend, in ``kv_transfer_params`` of vLLM and ``custom_params`` of SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmcache.blend.correctors import make_corrector
from lmcache.blend.correctors.interface import Corrector
from lmcache.blend.from_config import make_corrector_from_config, make_policy_from_config, recompute_ratio
from lmcache.blend.plugins import canonical
from lmcache.blend.policies import make_policy
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.config import LMCacheEngineConfig
from lmcache.segmentation.explicit import PARAMETER as SEGMENTS

BLEND = "lmcache.blend"
RATIO = "lmcache.blend_ratio"
POLICY = "lmcache.blend_policy"
CORRECTOR = "lmcache.blend_corrector"


@dataclass(frozen=True)
class BlendOptions:
    """``segments`` are passages that the request names itself, as it sent them."""

    enabled: bool
    ratio: float
    policy: SelectionPolicy
    corrector: Corrector
    segments: Any = None


class BlendDefaults:
    """The configuration's choice, which a request may change for itself."""

    def __init__(self, config: LMCacheEngineConfig) -> None:
        """Raises:
        ValueError: the configuration names an unknown policy or corrector, or a bad option of one.
        """
        self._options = BlendOptions(
            enabled=True,
            ratio=recompute_ratio(config),
            policy=make_policy_from_config(config),
            corrector=make_corrector_from_config(config),
        )

    def for_request(self, params: Mapping[str, Any]) -> BlendOptions:
        """Raises:
        ValueError: a value cannot be used; the message names the parameter.
        """
        default = self._options
        enabled = params.get(BLEND, True)
        if not isinstance(enabled, bool):
            raise ValueError(f"{BLEND}={enabled!r}: must be true or false")
        ratio = params.get(RATIO, default.ratio)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            raise ValueError(f"{RATIO}={ratio!r}: must be a number from 0 to 1")
        policy, corrector = params.get(POLICY, default.policy.name), params.get(CORRECTOR, default.corrector.name)
        for key, name in ((POLICY, policy), (CORRECTOR, corrector)):
            if not isinstance(name, str):
                raise ValueError(f"{key}={name!r}: must be a name")
        # A name that is also the default's keeps the default's options.
        return BlendOptions(
            enabled=enabled,
            ratio=float(ratio),
            policy=default.policy if canonical(policy) == default.policy.name else make_policy(policy),
            corrector=default.corrector
            if canonical(corrector) == default.corrector.name
            else make_corrector(corrector),
            segments=params.get(SEGMENTS),
        )
