"""Search: encoder or decoder output -> tokens or text, the same alone and in a padded batch."""

from modules.search.attention import JointBeamSearch
from modules.search.ctc import CTCSearch, ctc_greedy

__all__ = ["CTCSearch", "JointBeamSearch", "ctc_greedy"]
