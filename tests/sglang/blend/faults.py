"""What can be made to go wrong in :mod:`tests.sglang.blend.launch`, by name."""

from tests.blend_mistakes import BOTTOM_RIGHT, UNROTATED

STEPS = (
    "integration.sglang.blend.planning:BlendPlanning._look",
    "integration.sglang.blend.planning:BlendPlanning._resident",
    "segmentation.known_passages:KnownPassages.find",
    "blend.passage_lease:PassageLease.ready",
    "blend.passage_lease:PassageLease.cut",
    "blend.passage_lease:PassageLease.passages",
    "integration.sglang.blend.planning:BlendPlanning.fill",
    "integration.sglang.blend.blender:Blender.run",
    "integration.sglang.blend.host:SGLangModel.run",
    "blend.forwards:Recompute.take",
    "blend.layer_kv:LayerKV.write",
    "paging.paged_connector:PagedConnector.token_index",
    "paging.paged_connector:PagedConnector.write_tokens",
    "integration.sglang.blend.planning:BlendPlanning._keep_holes",
)
MISTAKES = (UNROTATED, BOTTOM_RIGHT)
