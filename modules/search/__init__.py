"""Search: encoder or decoder output -> tokens or text, the same alone and in a padded batch."""

from modules.search.attention import JointBeamSearch
from modules.search.ctc import CTCSearch, ctc_greedy
from modules.search.ctc_beam import ctc_beam

__all__ = ["CTCSearch", "JointBeamSearch", "ctc_beam", "ctc_greedy"]
