"""Random texts with all that tokenizers treat in ways of their own.

Without what some of them do not keep: SmolLM2's has no tokens for most control characters and unassigned planes, and
SentencePiece makes "▁" a space.
"""

from __future__ import annotations

import unicodedata

import hypothesis.strategies as st

# fmt: off
_fragments = st.sampled_from([
    "the", " the", "The", " of", "ing", "'s", "12345", " 7", ".", "...", ", ", ":\n", "#", " #", "# ", "##", "\n# A\n",
    " ", "  ", "\t", "\n", "\n\n", "\r\n", "\u3000", "é", "ü", "中文", " 文", "🙂", " 🙂", "👩\u200d👧", "про",
    "<0x41>", "Ġ", "\ufffd",
])
# fmt: on
texts = st.lists(
    _fragments
    | st.text(st.characters(exclude_categories=("Cc", "Cn", "Co", "Cs"), exclude_characters="▁"), max_size=3),
    max_size=12,
).map(
    # As some tokenizers do it themselves.
    lambda parts: unicodedata.normalize("NFC", "".join(parts))
)
