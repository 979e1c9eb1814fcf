"""Two readings of one window: characters for the student, k-mers for the teacher.

    windows = np.frombuffer(b"ACGTACGTNACG", np.uint8)[None]       # [B, L] ASCII letters
    ids = CharacterTokenizer().encode(windows)                     # [B, L]
    tokens = KmerTokenizer().encode(windows)                       # ids [B, T], groups [B, L], …
    masked = tokens.spread(torch.rand(tokens.ids.shape) < 0.15)    # tokens → their characters [B, L]

Which characters belong to which k-mer comes from `KmerTokens.groups`, never from `position // 6`: an N breaks
the frame. Reverse-complement windows before they are tokenised, since a k-mer reading of the other strand is
another reading.
"""

from __future__ import annotations

from ._character import CharacterTokenizer as CharacterTokenizer
from ._kmer import KmerTokenizer as KmerTokenizer
from ._tokens import KmerTokens as KmerTokens
